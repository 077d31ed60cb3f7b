//! How long each kernel takes alone, with the names of torch's figures for the same in `benches/gpu/torch_kernels.py`.

use std::sync::Arc;

use anyhow::Result;
use galerne_kernels::cuda::driver::Driver;
use galerne_kernels::cuda::native::Overlap;
use galerne_kernels::cuda::timing::{self, Sizes, Timing};

use super::Figure;
use crate::kernels;

pub(super) fn run(quick: bool) -> Result<()> {
    let driver: Arc<dyn Driver> = Arc::new(kernels::driver(0, Overlap::None)?);
    let sizes = if quick { Sizes::Tiny } else { Sizes::Full };
    let mut printed = Ok(());
    timing::run(&driver, sizes, &mut |timing| {
        let line = figure(&timing).print();
        if printed.is_ok() {
            printed = line;
        }
    })?;
    printed
}

fn figure(timing: &Timing) -> Figure {
    let tera = timing.flops / timing.seconds / 1e12;
    Figure {
        name: timing.name.clone(),
        value: Some(timing.seconds * 1e6),
        unit: Some("us"),
        bytes_per_s: Some(timing.bytes as f64 / timing.seconds),
        peers: peers(&timing.name),
        note: (timing.flops > 0.0).then(|| format!("{tera:.1} TFLOP/s")),
        ..Figure::default()
    }
}

/// What 8 or 4 bits win is won against bf16; 8-bit floats have a peer of their own too.
fn peers(name: &str) -> Vec<String> {
    let words: Vec<&str> = name.splitn(3, ' ').collect();
    match words[..] {
        ["linear", format, shape] => {
            let mut peers = vec![format!("cuBLAS bf16 {shape}")];
            if format.starts_with("fp8") {
                peers.push(format!("cuBLAS fp8 {shape}"));
            }
            peers
        }
        ["attention", _, shape] => vec![format!("flash {shape}"), format!("cudnn {shape}")],
        _ => vec![format!("torch {name}")],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peers_have_the_names_that_the_script_gives() {
        assert_eq!(
            peers("linear codes8 16 x 4096 to 28672"),
            ["cuBLAS bf16 16 x 4096 to 28672"]
        );
        assert_eq!(
            peers("linear fp8-by-library 2048 x 4096 to 28672"),
            [
                "cuBLAS bf16 2048 x 4096 to 28672",
                "cuBLAS fp8 2048 x 4096 to 28672"
            ]
        );
        assert_eq!(
            peers("attention fp8 decode 32 x 4096"),
            ["flash decode 32 x 4096", "cudnn decode 32 x 4096"]
        );
        assert_eq!(
            peers("rms norm f32 4096 x 4096"),
            ["torch rms norm f32 4096 x 4096"]
        );
    }
}
