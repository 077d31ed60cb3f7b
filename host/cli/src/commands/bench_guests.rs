//! `galerne bench guests`: how long a new instance of each guest in this binary takes.

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Result, ensure};
use clap::Args;
use galerne_core::filter::RequestInfo;
use galerne_core::guest::{GuestError, Waker};
use galerne_plugin::PluginHost;
use serde::Serialize;

use crate::config::DataArgs;
use crate::guests;

/// Options of `galerne bench guests`.
#[derive(Debug, Args)]
pub(super) struct GuestsBenchArgs {
    /// Instances of each guest
    #[arg(long, default_value = "2000")]
    instances: usize,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Instances made before counting, so that the pool and the caches are warm.
const WARM: usize = 50;

/// Vocabulary of the samplers' model; any will do.
const VOCABULARY: u32 = 49_152;

/// The first-party filter that is measured.
const FILTER: &str = "pii-redact";

#[derive(Debug, Serialize)]
struct Figure {
    name: String,
    p50_us: f64,
    p99_us: f64,
}

pub(super) fn run(data: &DataArgs, args: &GuestsBenchArgs) -> Result<()> {
    ensure!(args.instances > 0, "--instances: expected at least 1");
    let plugins = PluginHost::new(guests::plugin_options(data)?)?;
    let mut figures = Vec::new();
    let waker: Waker = Arc::new(|| ());
    for (name, factory) in guests::samplers(&plugins, &[])? {
        let make = || factory.session("{}", VOCABULARY, 1, Arc::clone(&waker));
        figures.push(measure(args, name, make)?);
    }
    let info = RequestInfo {
        id: "bench".to_owned(),
        model: "bench".to_owned(),
    };
    let filter = plugins.load_filter(FILTER, guests::embedded(FILTER)?)?;
    figures.push(measure(args, FILTER.to_owned(), || filter.session("{}", &info))?);
    if args.json {
        println!("{}", serde_json::to_string_pretty(&figures)?);
    }
    Ok(())
}

/// Makes instances one after the other; ending one is not counted.
fn measure<T>(
    args: &GuestsBenchArgs,
    name: String,
    make: impl Fn() -> Result<T, GuestError>,
) -> Result<Figure> {
    for _ in 0..WARM {
        make()?;
    }
    let mut times_us = Vec::with_capacity(args.instances);
    for _ in 0..args.instances {
        let begin = Instant::now();
        let instance = make()?;
        times_us.push(begin.elapsed().as_secs_f64() * 1e6);
        drop(instance);
    }
    times_us.sort_by(f64::total_cmp);
    let at = |percent: usize| times_us[(times_us.len() - 1) * percent / 100];
    let figure = Figure {
        name,
        p50_us: at(50),
        p99_us: at(99),
    };
    if !args.json {
        println!(
            "{:<20} new instance: p50 {:.1} us, p99 {:.1} us",
            figure.name, figure.p50_us, figure.p99_us
        );
    }
    Ok(figure)
}
