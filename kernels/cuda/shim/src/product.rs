//! What a library for matrix products computes, plainly.

use galerne_kernels::cuda::driver::{DevicePtr, Product, ProductElement};
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
    let element = shape.element();
    let strides = [
        shape.x_stride * element.bytes(),
        shape.w_stride * element.bytes(),
        shape.out_stride * 4,
    ];
    assert!(strides.iter().all(|bytes| bytes.is_multiple_of(16)), "{shape:?}");
    if element == ProductElement::Fp8 {
        let is_known = shape.columns.is_multiple_of(16) && product.bias == DevicePtr::NULL;
        assert!(is_known, "a product of 8-bit floats: {product:?}");
    }
    for row in 0..shape.rows {
        for column in 0..shape.columns {
            let sum = (0..shape.depth).map(|k| {
                // SAFETY: the caller's contract.
                unsafe {
                    number(element, product.x, row * shape.x_stride + k)
                        * number(element, product.w, column * shape.w_stride + k)
                }
            });
            let mut sum: f64 = sum.sum();
            if element == ProductElement::Fp8 {
                // SAFETY: the caller's contract.
                let factors: [f32; 2] = unsafe {
                    [
                        at_index(product.x_factors, row),
                        at_index(product.w_factors, column),
                    ]
                };
                sum *= f64::from(factors[0]) * f64::from(factors[1]);
            }
            if product.bias != DevicePtr::NULL {
                // SAFETY: the caller's contract.
                sum += f64::from(unsafe { at_index::<f32>(product.bias, column) });
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
unsafe fn at_index<T: Copy>(at: DevicePtr, index: u32) -> T {
    // SAFETY: the caller's contract.
    unsafe { (at.0 as *const T).wrapping_add(index as usize).read() }
}

/// # Safety
/// As [`at_index`], of the element's type.
unsafe fn number(element: ProductElement, at: DevicePtr, index: u32) -> f64 {
    // SAFETY: the caller's contract.
    unsafe {
        match element {
            ProductElement::Bf16 => bf16::from_bits(at_index(at, index)).to_f64(),
            ProductElement::F16 => f16::from_bits(at_index(at, index)).to_f64(),
            ProductElement::Fp8 => float8(at_index(at, index)),
        }
    }
}

/// e4m3: a sign, 4 bits of exponent, 3 of mantissa; all of them set is no number.
fn float8(code: u8) -> f64 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f64::from(code & 7));
    let size = match (exponent, code & 7) {
        (15, 7) => f64::NAN,
        (0, _) => mantissa * 2f64.powi(-9),
        _ => (1.0 + mantissa / 8.0) * 2f64.powi(exponent - 7),
    };
    if code & 0x80 == 0 { size } else { -size }
}
