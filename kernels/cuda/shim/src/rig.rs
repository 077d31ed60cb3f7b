//! What tests of kernels run on: the shim, or a GPU if there is one and the environment names compiled kernels. Knows no kernel.

use std::ops::Deref;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use bytemuck::Pod;
use galerne_kernels::cuda::driver::{Driver, Products};
use galerne_kernels::cuda::image::{Arch, Image};
use galerne_kernels::cuda::native::{Module, NativeDriver, Overlap, find};

use crate::{Memory, Shim};

/// An archive of compiled kernels, as `cargo xtask kernels` writes it: with it tests run on the first GPU.
const KERNELS: &str = "GALERNE_TEST_CUDA";

/// A driver for one test.
pub struct Rig {
    on: On,
    products: Products,
}

enum On {
    Shim(Shim),
    Gpu(Arc<NativeDriver>),
}

impl Rig {
    /// On the shim the order of a block's threads is made from `seed`.
    ///
    /// # Panics
    /// If a GPU is asked for and cannot be used.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let on = match gpu() {
            Some(driver) => On::Gpu(driver),
            None => On::Shim(Shim::new(seed)),
        };
        Self {
            on,
            products: Products::None,
        }
    }

    /// The same with a library for matrix products, if the GPU has one.
    #[must_use]
    pub fn with_products(self) -> Self {
        let on = match self.on {
            On::Shim(shim) => On::Shim(shim.with_products()),
            gpu @ On::Gpu(_) => gpu,
        };
        let rig = Self { on, ..self };
        let products = rig
            .properties()
            .map_or(Products::None, |properties| properties.products);
        Self { products, ..rig }
    }

    /// What the test's library for matrix products runs.
    #[must_use]
    pub const fn products(&self) -> Products {
        self.products
    }

    /// Device memory with these numbers.
    #[must_use]
    pub fn memory<T: Pod>(&self, numbers: &[T]) -> Memory<'_, T> {
        Memory::new(&**self, numbers)
    }

    /// Device memory for `count` numbers, all bytes 0xff: NaN in every format of floats.
    #[must_use]
    pub fn poisoned<T: Pod>(&self, count: usize) -> Memory<'_, T> {
        Memory::poisoned(&**self, count)
    }
}

impl Deref for Rig {
    type Target = dyn Driver;

    fn deref(&self) -> &Self::Target {
        match &self.on {
            On::Shim(shim) => shim,
            On::Gpu(driver) => &**driver,
        }
    }
}

/// The GPU that the environment asks for. All tests of a process share it.
fn gpu() -> Option<Arc<NativeDriver>> {
    static GPU: OnceLock<Option<Arc<NativeDriver>>> = OnceLock::new();
    let driver = || {
        let path = std::env::var_os(KERNELS)?;
        Some(Arc::new(open(path.as_ref())))
    };
    GPU.get_or_init(driver).clone()
}

fn open(path: &Path) -> NativeDriver {
    let archive = std::fs::read(path).expect("the archive of kernels can be read");
    let image = Image::open(archive.leak()).expect("it is an archive of kernels");
    let gpus = find().expect("there is a GPU");
    let arch = Arch::of_capability(gpus[0].capability).expect("a GPU that the kernels are compiled for");
    let modules: Vec<Module> = image
        .modules(arch)
        .map(|module| Module {
            code: module.code().expect("a whole module"),
            kernels: module.kernels.iter().map(|name| (*name).to_owned()).collect(),
        })
        .collect();
    NativeDriver::open(0, &modules, Overlap::None).expect("the GPU can be used")
}
