//! The engine on its own thread: queues, wake-ups, shutdown and failure.

mod support;

use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use galerne_core::guest::{Answer, PlanStep, SamplerSession, Waker};
use galerne_core::ids::BlockId;
use galerne_core::limits::EngineLimits;
use galerne_core::sampling::{Candidate, SamplingPlan};
use galerne_engine::handle::{EngineHandle, EngineOptions, start};
use galerne_engine::request::{Event, FinishReason, Request, Sampling, SequenceError, SubmitError};
use galerne_kernels::device::{
    DeviceError, LoadedProgram, MemoryUse, SampleOutcome, SampleRequest, StepBatch,
};

use support::device::{FakeProgram, VOCABULARY};
use support::guest::{FakeGuest, Manner};
use support::{Bench, limits, request};

const LONG: Duration = Duration::from_secs(20);

fn run(limits: EngineLimits, program: impl LoadedProgram + 'static) -> EngineHandle {
    let options = EngineOptions {
        limits,
        seed: 5,
        check_integrity: true,
        ..EngineOptions::default()
    };
    start(Box::new(program), VOCABULARY, 64, options)
}

fn engine(limits: EngineLimits) -> EngineHandle {
    run(limits, FakeProgram::new(limits))
}

fn submit(engine: &EngineHandle, request: Request) -> Receiver<Event> {
    let (sender, receiver) = channel();
    let sink = move |event| {
        // The test may have lost interest.
        let _ = sender.send(event);
    };
    engine.submit(request, Box::new(sink)).expect("accepted");
    receiver
}

/// All tokens and the last event.
fn collect(events: &Receiver<Event>) -> (Vec<u32>, Event) {
    let mut tokens = Vec::new();
    loop {
        match events
            .recv_timeout(LONG)
            .expect("an event before the sink is dropped")
        {
            Event::Token { token, .. } => tokens.push(token.0),
            last => {
                assert!(
                    events.recv_timeout(LONG).is_err(),
                    "nothing follows the last event"
                );
                return (tokens, last);
            }
        }
    }
}

fn is_finished(event: &Event, wanted: FinishReason) -> bool {
    matches!(event, Event::Finished { reason, .. } if *reason == wanted)
}

fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let end = Instant::now() + LONG;
    while !condition() {
        assert!(Instant::now() < end, "{what} did not happen");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A device whose steps wait until the test lets them go.
struct Gated {
    inner: FakeProgram,
    gate: Receiver<()>,
    /// Whether a step waits at the gate.
    is_closed: bool,
}

impl LoadedProgram for Gated {
    fn submit(&mut self, batch: &StepBatch) -> Result<(), DeviceError> {
        self.is_closed = true;
        self.inner.submit(batch)
    }

    fn wait(&mut self) -> Result<(), DeviceError> {
        if std::mem::take(&mut self.is_closed) {
            // A dropped sender opens the gate for good.
            let _ = self.gate.recv_timeout(LONG);
        }
        self.inner.wait()
    }

    fn sample(&mut self, requests: &[SampleRequest<'_>]) -> Result<Vec<SampleOutcome>, DeviceError> {
        self.wait()?;
        self.inner.sample(requests)
    }

    fn read_output(&mut self) -> Result<Vec<f32>, DeviceError> {
        self.inner.read_output()
    }

    fn copy_blocks(&mut self, pairs: &[(BlockId, BlockId)]) -> Result<(), DeviceError> {
        self.inner.copy_blocks(pairs)
    }

    fn zero_blocks(&mut self, blocks: &[BlockId]) -> Result<(), DeviceError> {
        self.inner.zero_blocks(blocks)
    }

    fn memory(&self) -> MemoryUse {
        self.inner.memory()
    }
}

#[test]
fn many_callers_get_the_tokens_of_their_own_run() {
    let limits = limits(24, 4, 16, 4);
    let engine = engine(limits);
    let callers: Vec<_> = (0..8_u32)
        .map(|caller| {
            let engine = engine.clone();
            std::thread::spawn(move || {
                let prompt = [caller, 2, 3, caller % 3, 5];
                let mut alone = Bench::new(limits, 64);
                let expected = alone.submit(request(&prompt, 12));
                alone.drain();
                for _ in 0..5 {
                    let (tokens, last) = collect(&submit(&engine, request(&prompt, 12)));
                    assert_eq!(tokens, expected.tokens());
                    assert!(is_finished(&last, FinishReason::Length), "{last:?}");
                }
            })
        })
        .collect();
    callers
        .into_iter()
        .for_each(|caller| caller.join().expect("a caller's tokens are its own"));
    engine.check_integrity().expect("sound");
    let stats = engine.stats();
    assert_eq!(
        (
            stats.running,
            stats.waiting,
            stats.blocks_used,
            stats.sequences_ended
        ),
        (0, 0, 0, 40)
    );
    assert_eq!((stats.tokens_decoded, stats.integrity), (480, None));
}

#[test]
fn a_full_queue_refuses_and_has_room_again() {
    let limits = EngineLimits {
        queue_max: 2,
        ..limits(24, 4, 16, 1)
    };
    let (open, gate) = channel();
    let engine = run(
        limits,
        Gated {
            inner: FakeProgram::new(limits),
            gate,
            is_closed: false,
        },
    );
    let running = submit(&engine, request(&[1, 2], 3));
    wait_until("admission", || engine.queued() == 0);
    let waiting = [
        submit(&engine, request(&[1], 3)),
        submit(&engine, request(&[2], 3)),
    ];
    let refused = engine.submit(
        request(&[3], 3),
        Box::new(|_| panic!("a refused request has no events")),
    );
    let Err(SubmitError::QueueFull {
        waiting: 2,
        retry_after_ms,
    }) = refused
    else {
        panic!("{refused:?}")
    };
    assert!((50..=30_000).contains(&retry_after_ms), "{retry_after_ms}");
    drop(open);
    for events in [&running, &waiting[0], &waiting[1]] {
        assert!(is_finished(&collect(events).1, FinishReason::Length));
    }
    assert_eq!(engine.queued(), 0);
    collect(&submit(&engine, request(&[3], 3)));
}

#[test]
fn a_cancelled_sequence_frees_its_blocks_within_a_step() {
    let limits = limits(24, 4, 16, 1);
    let (open, gate) = channel();
    let engine = run(
        limits,
        Gated {
            inner: FakeProgram::new(limits),
            gate,
            is_closed: false,
        },
    );
    let (sender, events) = channel();
    let sinks = [sender.clone(), sender].map(|sender| {
        Box::new(move |event| {
            let _ = sender.send(event);
        })
    });
    let ids = sinks.map(|sink| {
        engine
            .submit(request(&[1, 2, 3, 4, 5], 50), sink)
            .expect("accepted")
    });
    wait_until("admission", || engine.stats().running == 1);
    // The step under way, then nothing more.
    ids.iter().for_each(|id| engine.cancel(*id));
    open.send(()).expect("the device waits");
    engine.check_integrity().expect("sound");
    let stats = engine.stats();
    assert_eq!(
        (stats.blocks_used, stats.running, stats.waiting, stats.steps),
        (0, 0, 0, 1)
    );
    let all: Vec<_> = events.iter().collect();
    let cancelled = all
        .iter()
        .filter(|event| is_finished(event, FinishReason::Cancelled))
        .count();
    assert_eq!(cancelled, 2, "{all:?}");
    assert_eq!(engine.queued(), 0);
}

#[test]
fn shutdown_finishes_what_was_accepted_and_takes_no_more() {
    let limits = limits(24, 4, 16, 1);
    let (open, gate) = channel();
    let engine = run(
        limits,
        Gated {
            inner: FakeProgram::new(limits),
            gate,
            is_closed: false,
        },
    );
    let accepted: Vec<_> = (1..4).map(|i| submit(&engine, request(&[i], 4))).collect();
    engine.shutdown();
    assert!(!engine.is_accepting());
    let refused = engine.submit(request(&[1], 4), Box::new(|_| ()));
    assert_eq!(refused, Err(SubmitError::ShuttingDown));
    drop(open);
    for events in &accepted {
        assert!(is_finished(&collect(events).1, FinishReason::Length));
    }
    wait_until("the end of the thread", || !engine.is_alive());
    engine.check_integrity().expect("sound to the end");
}

#[test]
fn dropping_the_last_handle_finishes_too() {
    let engine = engine(limits(24, 4, 16, 1));
    let events = submit(&engine, request(&[1], 4));
    drop(engine);
    assert!(is_finished(&collect(&events).1, FinishReason::Length));
}

#[test]
fn a_failed_device_fails_every_sequence_and_ends_the_engine() {
    // The device may fail before the second request is there; then that run shows only half, and another is made.
    let both = (0..200).any(|_| fails_both());
    assert!(
        both,
        "in 200 runs the second request never came before the failure"
    );
}

/// Whether both requests were in the engine when its device failed; each that was must have been told.
fn fails_both() -> bool {
    let limits = limits(24, 4, 16, 1);
    let mut program = FakeProgram::new(limits);
    program.steps_left = 3;
    let engine = run(limits, program);
    let all = [
        try_submit(&engine, request(&[1], 40)),
        try_submit(&engine, request(&[2], 40)),
    ];
    for events in all.iter().flatten() {
        let (_, last) = collect(events);
        assert!(
            matches!(last, Event::Failed(SequenceError::Device(_))),
            "{last:?}"
        );
    }
    wait_until("the end of the thread", || !engine.is_alive());
    assert_eq!(
        engine.submit(request(&[1], 4), Box::new(|_| ())),
        Err(SubmitError::ShuttingDown)
    );
    all.iter().all(Option::is_some)
}

/// `None` if the engine takes no more requests.
fn try_submit(engine: &EngineHandle, request: Request) -> Option<Receiver<Event>> {
    let (sender, receiver) = channel();
    let sink = move |event| {
        let _ = sender.send(event);
    };
    match engine.submit(request, Box::new(sink)) {
        Ok(_) => Some(receiver),
        Err(SubmitError::ShuttingDown) => None,
        Err(other) => panic!("{other}"),
    }
}

/// A guest on its own thread that takes longer than the grace, then wakes the engine.
struct Slow {
    waker: Waker,
    plan: Arc<Mutex<Option<SamplingPlan>>>,
}

impl SamplerSession for Slow {
    fn request_plan(&mut self, step: PlanStep) {
        let (waker, plan) = (Arc::clone(&self.waker), Arc::clone(&self.plan));
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(15));
            let forced = vec![galerne_core::ids::TokenId(step.position + 1)];
            let answer = SamplingPlan {
                forced,
                valid_steps: 1,
                ..SamplingPlan::default()
            };
            *plan.lock().expect("no panic while held") = Some(answer);
            waker();
        });
    }

    fn take_plan(&mut self) -> Answer<SamplingPlan> {
        let plan = self.plan.lock().expect("no panic while held").take();
        plan.map_or(Answer::Pending, |plan| Answer::Ready(Ok(plan)))
    }

    fn request_choice(&mut self, _: Vec<Candidate>) {}

    fn take_choice(&mut self) -> Answer<usize> {
        Answer::Pending
    }
}

#[test]
fn a_slow_guest_wakes_the_engine_and_holds_up_nobody() {
    let engine = engine(limits(24, 4, 16, 2));
    let guest = Slow {
        waker: engine.waker(),
        plan: Arc::default(),
    };
    let slow = submit(
        &engine,
        Request {
            sampling: Sampling::Guest(Box::new(guest)),
            ..request(&[1], 4)
        },
    );
    let quick = submit(&engine, request(&[2, 3], 30));
    let (tokens, last) = collect(&slow);
    assert_eq!(tokens, [1, 2, 3, 4]);
    let Event::Finished { usage, .. } = last else {
        panic!("{last:?}")
    };
    assert!(usage.sat_out_steps >= 1, "{usage:?}");
    assert_eq!(collect(&quick).0.len(), 30);
    // While the guest thinks and nothing else runs, the engine sleeps.
    assert!(engine.stats().steps < 100, "{:?}", engine.stats());
}

#[test]
fn a_guest_within_the_grace_sits_out_nothing() {
    let engine = engine(limits(24, 4, 16, 2));
    let manner = Manner {
        valid_steps: 1,
        candidates: 4,
        ..Manner::default()
    };
    let sampling = Sampling::Guest(Box::new(FakeGuest::new(manner)));
    let (tokens, last) = collect(&submit(
        &engine,
        Request {
            sampling,
            ..request(&[1], 8)
        },
    ));
    let Event::Finished { usage, .. } = last else {
        panic!("{last:?}")
    };
    assert_eq!((tokens.len(), usage.sat_out_steps), (8, 0));
}

#[test]
fn a_panicking_device_leaves_nobody_waiting() {
    struct Panics;
    impl LoadedProgram for Panics {
        fn submit(&mut self, _: &StepBatch) -> Result<(), DeviceError> {
            panic!("a bug in a device")
        }
        fn wait(&mut self) -> Result<(), DeviceError> {
            Ok(())
        }
        fn sample(&mut self, _: &[SampleRequest<'_>]) -> Result<Vec<SampleOutcome>, DeviceError> {
            Ok(Vec::new())
        }
        fn read_output(&mut self) -> Result<Vec<f32>, DeviceError> {
            Ok(Vec::new())
        }
        fn copy_blocks(&mut self, _: &[(BlockId, BlockId)]) -> Result<(), DeviceError> {
            Ok(())
        }
        fn zero_blocks(&mut self, _: &[BlockId]) -> Result<(), DeviceError> {
            Ok(())
        }
        fn memory(&self) -> MemoryUse {
            MemoryUse::default()
        }
    }
    let engine = run(limits(8, 4, 16, 2), Panics);
    let (_, last) = collect(&submit(&engine, request(&[1], 4)));
    assert_eq!(last, Event::Failed(SequenceError::EngineStopped));
    wait_until("the end of the thread", || !engine.is_alive());
}
