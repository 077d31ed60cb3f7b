//! `galerne doctor --measure`: how fast this machine reads memory and computes, the limits of every kernel.

use std::num::NonZeroUsize;
use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use galerne_kernels::cpu::Isa;
use galerne_kernels::cpu::measure::{Arithmetic, ReadBuffer, STREAMS, gop_per_s};
use galerne_kernels::device::DeviceInfo;
use serde::Serialize;

/// About a small quantized model: what a decode step reads.
const MODEL_BYTES: usize = 96 << 20;
/// A buffer that the last cache does not hold is this many times as large, within [`LARGE_BYTES`].
const CACHES: usize = 4;
const LARGE_BYTES: std::ops::RangeInclusive<usize> = 256 << 20..=2_048 << 20;
/// For each figure.
const TIME: Duration = Duration::from_millis(150);

#[derive(Serialize)]
struct Measured {
    isa: &'static str,
    threads: usize,
    /// With the best number of streams a thread.
    read: Vec<Read>,
    arithmetic: Vec<Peak>,
}

#[derive(Serialize)]
struct Read {
    buffer_bytes: usize,
    threads: usize,
    streams: usize,
    gb_per_s: f64,
}

#[derive(Serialize)]
struct Peak {
    operation: &'static str,
    threads: usize,
    gop_per_s: f64,
}

pub(super) fn run(info: &DeviceInfo, json: bool) -> Result<()> {
    let isa = Isa::detect();
    let all = NonZeroUsize::new(info.threads).unwrap_or(NonZeroUsize::MIN);
    let mut threads = vec![NonZeroUsize::MIN, all];
    threads.dedup();
    let measured = Measured {
        isa: isa.name(),
        threads: all.get(),
        read: read(isa, &threads)?,
        arithmetic: arithmetic(isa, &threads),
    };
    if json {
        println!("{}", serde_json::to_string_pretty(&measured)?);
    } else {
        measured.print();
    }
    Ok(())
}

fn read(isa: Isa, threads: &[NonZeroUsize]) -> Result<Vec<Read>> {
    let large = (CACHES * last_cache_bytes().unwrap_or(0)).clamp(*LARGE_BYTES.start(), *LARGE_BYTES.end());
    let mut figures = Vec::new();
    for buffer_bytes in [MODEL_BYTES, large] {
        let buffer = ReadBuffer::new(buffer_bytes)?;
        for &threads in threads {
            let of = |streams| (streams, buffer.gb_per_s(isa, threads, streams, TIME));
            let best = STREAMS.into_iter().map(of).max_by(|a, b| a.1.total_cmp(&b.1));
            figures.extend(best.map(|(streams, gb_per_s)| Read {
                buffer_bytes,
                threads: threads.get(),
                streams,
                gb_per_s,
            }));
        }
    }
    Ok(figures)
}

fn arithmetic(isa: Isa, threads: &[NonZeroUsize]) -> Vec<Peak> {
    let mut figures = Vec::new();
    for arithmetic in Arithmetic::ALL {
        for &threads in threads {
            figures.extend(gop_per_s(arithmetic, isa, threads, TIME).map(|gop_per_s| Peak {
                operation: arithmetic.name(),
                threads: threads.get(),
                gop_per_s,
            }));
        }
    }
    figures
}

/// Size of the largest cache of the first core, where the kernel tells.
fn last_cache_bytes() -> Option<usize> {
    let caches = std::fs::read_dir("/sys/devices/system/cpu/cpu0/cache").ok()?;
    caches.filter_map(|cache| cache_bytes(&cache.ok()?.path())).max()
}

fn cache_bytes(cache: &Path) -> Option<usize> {
    let text = std::fs::read_to_string(cache.join("size")).ok()?;
    text.trim()
        .strip_suffix('K')?
        .parse::<usize>()
        .ok()?
        .checked_mul(1_024)
}

impl Measured {
    fn print(&self) {
        println!("cpu          {}, {} threads", self.isa, self.threads);
        for read in &self.read {
            println!(
                "read         {:>8.1} GB/s   {} MiB by {} in {} each",
                read.gb_per_s,
                read.buffer_bytes >> 20,
                count(read.threads, "thread"),
                count(read.streams, "stream")
            );
        }
        for peak in &self.arithmetic {
            println!(
                "arithmetic   {:>8.1} GOP/s  {}, {}",
                peak.gop_per_s,
                peak.operation,
                count(peak.threads, "thread")
            );
        }
    }
}

fn count(number: usize, what: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    format!("{number} {what}{plural}")
}
