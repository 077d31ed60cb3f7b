//! `galerne bench guests`: how long new instances of guests and the questions of a step take, in process and in a cell.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use anyhow::{Result, ensure};
use clap::Args;
use galerne_core::filter::RequestInfo;
use galerne_core::guest::{Answer, GuestError, PlanStep, SamplerFactory, SequenceInfo, Waker};
use galerne_core::ids::TokenId;
use galerne_engine::handle::WATCH;
use galerne_plugin::PluginHost;
use serde::Serialize;

use crate::config::DataArgs;
use crate::guests;

/// Options of `galerne bench guests`.
#[derive(Debug, Args)]
pub(super) struct GuestsBenchArgs {
    /// Repetitions of each measurement
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

/// The first-party sampler and filter that are measured.
const SAMPLER: &str = "mirostat";
const FILTER: &str = "pii-redact";
/// Whose cell is measured.
const TENANT: &str = "bench";
/// Sequences of a step.
const SEQUENCES: usize = 16;

#[derive(Debug, Serialize)]
struct Figure {
    name: String,
    p50_us: f64,
    p99_us: f64,
}

pub(super) fn run(data: &DataArgs, args: &GuestsBenchArgs) -> Result<()> {
    ensure!(args.instances > 0, "--instances: expected at least 1");
    let plugins = PluginHost::new(guests::plugin_options(data)?)?;
    let sampler = guests::embedded(SAMPLER)?;
    let waker: Waker = Arc::new(|| ());
    let here = plugins.load_sampler(SAMPLER, sampler)?;
    let session = || here.session(&SequenceInfo::new("{}", VOCABULARY, 1), Arc::clone(&waker));
    let info = RequestInfo {
        id: "bench".to_owned(),
        model: "bench".to_owned(),
    };
    let filter = plugins.load_filter(FILTER, guests::embedded(FILTER)?)?;
    let in_cell = plugins.for_tenant(TENANT).load_sampler(SAMPLER, sampler)?;
    let session_in_cell = || in_cell.session(&SequenceInfo::new("{}", VOCABULARY, 1), Arc::clone(&waker));
    let figures = [
        measure(args, &format!("a new instance of {SAMPLER}"), session)?,
        measure(args, &format!("a new instance of {FILTER}"), || {
            filter.session("{}", &info)
        })?,
        measure(
            args,
            &format!("a new session of {SAMPLER} in a running cell"),
            session_in_cell,
        )?,
        plans(
            args,
            &format!("a step's plans of {SEQUENCES} sessions, in process"),
            here.as_ref(),
        )?,
        plans(
            args,
            &format!("a step's plans of {SEQUENCES} sessions in a cell"),
            in_cell.as_ref(),
        )?,
    ];
    if args.json {
        println!("{}", serde_json::to_string_pretty(&figures)?);
    }
    Ok(())
}

/// Steps as the engine has them: every session is asked, and all answers are awaited.
fn plans(args: &GuestsBenchArgs, name: &str, factory: &dyn SamplerFactory) -> Result<Figure> {
    let (asker, missing) = (std::thread::current(), Arc::new(AtomicUsize::new(0)));
    let counted = Arc::clone(&missing);
    let waker: Waker = Arc::new(move || {
        if counted.fetch_sub(1, Ordering::AcqRel) == 1 {
            asker.unpark();
        }
    });
    let open = |_| factory.session(&SequenceInfo::new("{}", VOCABULARY, 1), Arc::clone(&waker));
    let mut sessions = (0..SEQUENCES).map(open).collect::<Result<Vec<_>, _>>()?;
    let step = || {
        missing.store(SEQUENCES, Ordering::Release);
        for session in &mut sessions {
            session.request_plan(PlanStep {
                position: 1,
                accepted: vec![TokenId(1)],
            });
        }
        sessions.iter_mut().for_each(|session| session.flush());
        let asked = Instant::now();
        while missing.load(Ordering::Acquire) > 0 && asked.elapsed() < WATCH {
            sessions[0].hear();
            std::thread::yield_now();
        }
        while missing.load(Ordering::Acquire) > 0 {
            std::thread::park();
        }
        for session in &mut sessions {
            if let Answer::Ready(plan) = session.take_plan() {
                plan?;
            }
        }
        Ok(())
    };
    measure(args, name, step)
}

/// Makes something again and again; ending it is not counted.
fn measure<T>(
    args: &GuestsBenchArgs,
    name: &str,
    mut make: impl FnMut() -> Result<T, GuestError>,
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
        name: name.to_owned(),
        p50_us: at(50),
        p99_us: at(99),
    };
    if !args.json {
        println!(
            "{:<48} p50 {:.1} us, p99 {:.1} us",
            figure.name, figure.p50_us, figure.p99_us
        );
    }
    Ok(figure)
}
