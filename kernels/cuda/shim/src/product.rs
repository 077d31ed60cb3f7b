//! What a library for matrix products computes, plainly.

use galerne_kernels::cuda::driver::{DevicePtr, Product};
use half::{bf16, f16};

/// Runs a product, sums in f64.
///
/// # Panics
/// An address or a stride is no multiple of 16 bytes: the library would refuse it or fail.
///
/// # Safety
/// The product's memory is allocated and as large as its shape says, and x and w do not overlap out.
pub(crate) unsafe fn run(product: &Product) {
    let shape = product.shape;
    for DevicePtr(at) in [product.x, product.w, product.bias, product.out] {
        assert!(at.is_multiple_of(16), "a product's operand at {at:#x}");
    }
    let strides = [shape.x_stride * 2, shape.w_stride * 2, shape.out_stride * 4];
    assert!(strides.iter().all(|bytes| bytes.is_multiple_of(16)), "{shape:?}");
    for row in 0..shape.rows {
        for column in 0..shape.columns {
            let sum = (0..shape.depth).map(|k| {
                // SAFETY: the caller's contract.
                let (x, w) = unsafe {
                    (
                        element(product.x, row * shape.x_stride + k),
                        element(product.w, column * shape.w_stride + k),
                    )
                };
                number(x, shape.is_f16) * number(w, shape.is_f16)
            });
            let mut sum: f64 = sum.sum();
            if product.bias != DevicePtr::NULL {
                // SAFETY: the caller's contract.
                sum += f64::from(unsafe { element::<f32>(product.bias, column) });
            }
            let out = (product.out.0 as *mut f32).wrapping_add((row * shape.out_stride + column) as usize);
            // SAFETY: the caller's contract.
            unsafe {
                if shape.accumulate == 1 {
                    sum += f64::from(out.read());
                }
                out.write(sum as f32);
            }
        }
    }
}

/// # Safety
/// There are more elements than `index` at this aligned address.
unsafe fn element<T: Copy>(at: DevicePtr, index: u32) -> T {
    // SAFETY: the caller's contract.
    unsafe { (at.0 as *const T).wrapping_add(index as usize).read() }
}

fn number(bits: u16, is_f16: u32) -> f64 {
    if is_f16 == 1 {
        f16::from_bits(bits).to_f64()
    } else {
        bf16::from_bits(bits).to_f64()
    }
}
