//! Compiles the kernels of `kernels/cuda` for the CPU, except those that one architecture's instructions make up.

use std::path::{Path, PathBuf};

fn main() {
    println!("cargo::rerun-if-changed=..");
    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++17")
        .flag("-xc++")
        .flag("-fno-strict-aliasing")
        .flag("-ffp-contract=off")
        // A misaligned 16-byte access is a fault on a GPU; here it is a trap.
        .flag("-fsanitize=alignment")
        .flag("-fsanitize-undefined-trap-on-error")
        .flag_if_supported("-Wno-unknown-pragmas")
        // Kernels switch stacks with longjmp, which fortified libraries take for an error.
        .flag("-U_FORTIFY_SOURCE")
        .define("GALERNE_SHIM", None)
        .opt_level(2)
        .include("..")
        .files(kernels(Path::new("..")))
        .files(["shim.cpp", "conversions.cpp", "test_kernels.cu"])
        // Kernels are found by name in a table they enter themselves: nothing refers to their objects.
        .link_lib_modifier("+whole-archive");
    if let Err(error) = build.try_compile("galerne_cuda_shim") {
        println!("cargo::error=the kernels could not be compiled for the CPU: {error}");
        println!(
            "cargo::error=the tests of the CUDA kernels need a C++17 compiler: install g++ or clang, or name it in CXX"
        );
    }
}

fn kernels(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).expect("the kernels lie in the folder above");
    let mut files: Vec<PathBuf> = entries
        .map(|entry| entry.expect("the folder is readable").path())
        .filter(|path| path.extension().is_some_and(|ext| ext == "cu"))
        .filter(|path| {
            let stem = path.file_stem().unwrap_or_default().to_string_lossy();
            !stem.ends_with("_sm90") && !stem.ends_with("_sm100")
        })
        .collect();
    files.sort();
    files
}
