//! The archive that the binary embeds, as `kernels/src/cuda/image.rs` reads it: there is its format.

use miniz_oxide::deflate::compress_to_vec_zlib;

use super::compile::Compiled;
use super::toolchain::COMPILER;

/// The same for the same modules, byte by byte.
pub(super) fn pack(compiled: &[Compiled]) -> Vec<u8> {
    let mut header = format!("galerne-kernels 1\ncompiler {COMPILER}\n");
    let mut bodies = Vec::new();
    for module in compiled {
        let packed = compress_to_vec_zlib(&module.code, 9);
        let kernels: Vec<&str> = module.kernels.keys().map(String::as_str).collect();
        header.push_str(&format!(
            "module {} {} {} {} {}\n",
            module.module,
            module.target,
            module.bytes,
            packed.len(),
            kernels.join(",")
        ));
        bodies.extend(packed);
    }
    let mut archive = header.into_bytes();
    archive.push(b'\n');
    archive.extend(bodies);
    archive
}
