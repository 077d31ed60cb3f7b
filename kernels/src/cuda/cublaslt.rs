//! Matrix products by NVIDIA's cuBLASLt, found at run time. How to run a shape is asked once. Knows no kernel and no program.
//!
//! Compiled only: no GPU has run it. Its matrices are column-major, so that a row-major `out = x w^T` is its `out^T = (w^T)^T x^T`,
//! where what it reads of each matrix is already transposed.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::c_void;
use std::sync::{Mutex, MutexGuard, PoisonError};

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;
use cudarc::driver;

use super::driver::{DevicePtr, DriverError, Product, ProductElement, ProductShape, Products};
use super::native::failed;

/// What NVIDIA recommends for Hopper and Blackwell.
const WORKSPACE_BYTES: usize = 32 << 20;
/// Then all are forgotten. A prompt's last chunk has any number of rows, so there may be many.
const PLANS_MAX: usize = 8_192;
/// Of all matrices, as [`Product`] promises.
const ALIGNMENT_BYTES: u32 = 16;
/// `CUBLAS_OP_T` of `cublas_api.h`.
const OPERATION_TRANSPOSE: u32 = 1;

/// The library, on the GPU whose context was current when it was opened. Dropping it needs that context too.
pub(super) struct Library {
    handle: sys::cublasLtHandle_t,
    /// Shared by all products: they run one after the other.
    workspace: DevicePtr,
    plans: Mutex<HashMap<Kind, Plan>>,
    products: Products,
}

/// What products must have in common to be run the same way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Kind {
    shape: ProductShape,
    has_bias: bool,
}

impl Kind {
    fn of(product: &Product) -> Self {
        Self {
            shape: product.shape,
            has_bias: product.bias != DevicePtr::NULL,
        }
    }

    /// Of a product that tells whether there can be such.
    fn small(element: ProductElement, accumulate: u32, has_bias: bool) -> Self {
        let shape = ProductShape {
            rows: 128,
            columns: 128,
            depth: 128,
            x_stride: 128,
            w_stride: 128,
            out_stride: 128,
            element: element as u32,
            accumulate,
        };
        Self { shape, has_bias }
    }
}

impl Library {
    /// If it can be loaded and runs every kind of product of 16-bit floats on this GPU.
    pub(super) fn open() -> Option<Self> {
        // SAFETY: it loads the library, if there is one, as the process is allowed to.
        if !unsafe { sys::is_culib_present() } {
            return None;
        }
        let mut library = Self {
            handle: result::create_handle().ok()?,
            workspace: DevicePtr::NULL,
            plans: Mutex::default(),
            products: Products::Floats16,
        };
        // SAFETY: memory of any content, released in `drop`.
        library.workspace = DevicePtr(unsafe { driver::result::malloc_sync(WORKSPACE_BYTES) }.ok()?);
        // One too old for the GPU says so here, where there still is another way.
        let mut plans = HashMap::new();
        let mut runs = |element, has_bias| {
            let mut kinds = [0, 1]
                .map(|accumulate| Kind::small(element, accumulate, has_bias))
                .into_iter();
            kinds.all(|kind| library.plan(&mut plans, kind).is_ok())
        };
        for element in [ProductElement::Bf16, ProductElement::F16] {
            if !(runs(element, false) && runs(element, true)) {
                return None;
            }
        }
        if runs(ProductElement::Fp8, false) {
            library.products = Products::Floats8;
        }
        Some(library)
    }

    /// What it runs on this GPU.
    pub(super) const fn products(&self) -> Products {
        self.products
    }

    /// Makes up its mind how to run a product.
    pub(super) fn prepare(&self, product: &Product) -> Result<(), DriverError> {
        self.plan(&mut self.plans(), Kind::of(product)).map(|_| ())
    }

    /// Enqueues a product.
    ///
    /// # Safety
    /// The context is current, the stream lives, and the product's memory is allocated and as large as its shape says, until it
    /// has run.
    pub(super) unsafe fn enqueue(
        &self,
        product: &Product,
        stream: driver::sys::CUstream,
    ) -> Result<(), DriverError> {
        let mut plans = self.plans();
        let plan = self.plan(&mut plans, Kind::of(product))?;
        let address = |at: DevicePtr| at.0 as *mut c_void;
        let (alpha, beta) = (
            1.0f32,
            if product.shape.accumulate == 1 {
                1.0f32
            } else {
                0.0
            },
        );
        let enqueue = || {
            plan.operation
                .set_addresses(product.bias, [product.w_factors, product.x_factors])?;
            // SAFETY: the plan was made for this shape; its handles live, and nobody else uses them while `plans` is locked.
            // The library copies alpha and beta. Memory and stream are the caller's contract.
            unsafe {
                result::matmul(
                    self.handle,
                    plan.operation.0,
                    (&raw const alpha).cast(),
                    (&raw const beta).cast(),
                    address(product.w),
                    plan.w.0,
                    address(product.x),
                    plan.x.0,
                    address(product.out),
                    plan.out.0,
                    address(product.out),
                    plan.out.0,
                    &raw const plan.algorithm,
                    address(self.workspace),
                    WORKSPACE_BYTES,
                    stream.cast(),
                )
            }
        };
        enqueue().map_err(|error| refused("cublasLtMatmul", product.shape, error))
    }

    fn plans(&self) -> MutexGuard<'_, HashMap<Kind, Plan>> {
        self.plans.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn plan<'p>(&self, plans: &'p mut HashMap<Kind, Plan>, kind: Kind) -> Result<&'p Plan, DriverError> {
        if plans.len() >= PLANS_MAX && !plans.contains_key(&kind) {
            plans.clear();
        }
        match plans.entry(kind) {
            Entry::Occupied(known) => Ok(known.into_mut()),
            Entry::Vacant(new) => {
                let plan = Plan::new(self.handle, kind, self.workspace);
                Ok(new.insert(plan.map_err(|error| refused("a plan of cuBLASLt", kind.shape, error))?))
            }
        }
    }
}

impl Drop for Library {
    fn drop(&mut self) {
        // SAFETY: both were made in `open`, and whoever drops it has waited for everything enqueued. It fails only with a
        // lost context, which has no memory any more.
        unsafe {
            let _ = result::destroy_handle(self.handle);
            if self.workspace != DevicePtr::NULL {
                let _ = driver::result::free_sync(self.workspace.0);
            }
        }
    }
}

fn refused(call: &str, shape: ProductShape, error: CublasError) -> DriverError {
    failed(call, format!("{error} for {shape:?}"))
}

/// How to run products of a kind.
struct Plan {
    operation: Operation,
    w: Layout,
    x: Layout,
    out: Layout,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

impl Plan {
    /// `any` is an address that is aligned like those of vectors to come.
    fn new(handle: sys::cublasLtHandle_t, kind: Kind, any: DevicePtr) -> Result<Self, CublasError> {
        let shape = kind.shape;
        let (narrow, is_scaled) = match shape.element() {
            ProductElement::Bf16 => (sys::cudaDataType::CUDA_R_16BF, false),
            ProductElement::F16 => (sys::cudaDataType::CUDA_R_16F, false),
            ProductElement::Fp8 => (sys::cudaDataType::CUDA_R_8F_E4M3, true),
        };
        let there = |is_there| if is_there { any } else { DevicePtr::NULL };
        let operation = Operation::new(kind.has_bias, is_scaled)?;
        operation.set_addresses(there(kind.has_bias), [there(is_scaled); 2])?;
        let w = Layout::new(narrow, [shape.depth, shape.columns], shape.w_stride)?;
        let x = Layout::new(narrow, [shape.depth, shape.rows], shape.x_stride)?;
        let wide = sys::cudaDataType::CUDA_R_32F;
        let out = Layout::new(wide, [shape.columns, shape.rows], shape.out_stride)?;
        let preference = Preference::new()?;
        // SAFETY: all handles live.
        let chosen = unsafe {
            result::get_matmul_algo_heuristic(handle, operation.0, w.0, x.0, out.0, out.0, preference.0)
        };
        Ok(Self {
            algorithm: chosen?.algo,
            operation,
            w,
            x,
            out,
        })
    }
}

/// What is done with the matrices: the first is transposed, sums are f32, the bias, if there is one, is as wide as the result's
/// columns are long, and factors, if there are any, belong to the columns of either matrix as the library sees them.
struct Operation(sys::cublasLtMatmulDesc_t);

impl Operation {
    fn new(has_bias: bool, is_scaled: bool) -> Result<Self, CublasError> {
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        let sums = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let operation = Self(result::create_matmul_desc(sums, sys::cudaDataType::CUDA_R_32F)?);
        operation.set(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, &OPERATION_TRANSPOSE)?;
        if has_bias {
            let epilogue = sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS as u32;
            operation.set(Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue)?;
        }
        if is_scaled {
            let mode = sys::cublasLtMatmulMatrixScale_t::CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F as u32;
            operation.set(Attribute::CUBLASLT_MATMUL_DESC_A_SCALE_MODE, &mode)?;
            operation.set(Attribute::CUBLASLT_MATMUL_DESC_B_SCALE_MODE, &mode)?;
        }
        Ok(operation)
    }

    /// Where the bias lies, and the factors of the first matrix and of the second; null where there are none.
    fn set_addresses(&self, bias: DevicePtr, factors: [DevicePtr; 2]) -> Result<(), CublasError> {
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        let [first, second] = factors;
        for (attribute, at) in [
            (Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias),
            (Attribute::CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, first),
            (Attribute::CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, second),
        ] {
            if at != DevicePtr::NULL {
                self.set(attribute, &at.0)?;
            }
        }
        Ok(())
    }

    fn set<T: bytemuck::Pod>(
        &self,
        attribute: sys::cublasLtMatmulDescAttributes_t,
        value: &T,
    ) -> Result<(), CublasError> {
        // SAFETY: the handle lives, and the library copies as many bytes as there are, or refuses them.
        unsafe {
            let from = (&raw const *value).cast();
            result::set_matmul_desc_attribute(self.0, attribute, from, size_of::<T>())
        }
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        // SAFETY: made in `new`, and used by nothing any more. It cannot fail.
        let _ = unsafe { result::destroy_matmul_desc(self.0) };
    }
}

/// A column-major matrix.
struct Layout(sys::cublasLtMatrixLayout_t);

impl Layout {
    fn new(element: sys::cudaDataType, [rows, columns]: [u32; 2], stride: u32) -> Result<Self, CublasError> {
        result::create_matrix_layout(element, rows.into(), columns.into(), stride.into()).map(Self)
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: as for `Operation`.
        let _ = unsafe { result::destroy_matrix_layout(self.0) };
    }
}

/// What an algorithm may use and rely on.
struct Preference(sys::cublasLtMatmulPreference_t);

impl Preference {
    fn new() -> Result<Self, CublasError> {
        use sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
        let preference = Self(result::create_matmul_pref()?);
        preference.set(
            Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
            &WORKSPACE_BYTES,
        )?;
        for attribute in [
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
        ] {
            preference.set(attribute, &ALIGNMENT_BYTES)?;
        }
        Ok(preference)
    }

    fn set<T: bytemuck::Pod>(
        &self,
        attribute: sys::cublasLtMatmulPreferenceAttributes_t,
        value: &T,
    ) -> Result<(), CublasError> {
        // SAFETY: as for `Operation::set`.
        unsafe {
            let from = (&raw const *value).cast();
            result::set_matmul_pref_attribute(self.0, attribute, from, size_of::<T>())
        }
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: as for `Operation`.
        let _ = unsafe { result::destroy_matmul_pref(self.0) };
    }
}
