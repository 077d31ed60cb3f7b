//! A loaded sampling guest and its sessions, whose questions are answered on the worker threads.
//! Knows nothing of logits and how a plan is executed.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use galerne_core::guest::{Answer, GuestError, PlanStep, SamplerFactory, SamplerSession, Waker};
use galerne_core::sampling::{Candidate, PlanError, SamplingPlan};
use wasmtime::Store;
use wasmtime::component::{InstancePre, ResourceAny};

use crate::bindings::sampling::exports::galerne::sampling::sampling::SequenceInfo;
use crate::bindings::sampling::{Sampler, SamplerPre};
use crate::convert;
use crate::instance::GuestCore;
use crate::limiter::StoreState;
use crate::workers::{Nature, QUICK_MAX};

/// A guest of the world `galerne:sampling/sampler@0.1.0`. Each session has its own instance.
pub(crate) struct SamplerGuest {
    core: GuestCore,
    pre: SamplerPre<StoreState>,
}

impl SamplerGuest {
    pub(crate) fn new(core: GuestCore, pre: InstancePre<StoreState>) -> Result<Self, GuestError> {
        let pre = SamplerPre::new(pre).map_err(|error| core.link_error(&error))?;
        core.try_out(pre.instance_pre(), |store, instance| {
            Sampler::new(store, instance)
        })?;
        Ok(Self { core, pre })
    }
}

impl SamplerFactory for SamplerGuest {
    fn session(
        &self,
        params_json: &str,
        vocabulary: u32,
        seed: u64,
        waker: Waker,
    ) -> Result<Box<dyn SamplerSession>, GuestError> {
        let info = SequenceInfo {
            params_json: params_json.to_owned(),
            vocabulary,
            seed,
        };
        let mut store = self.core.store();
        let limit = self.core.limits().request_deadline;
        let (sampler, created) = self.core.call(&mut store, "create", limit, |store| {
            let sampler: Sampler = self.pre.instantiate(&mut *store)?;
            let created = sampler
                .galerne_sampling_sampling()
                .session()
                .call_create(store, &info)?;
            Ok((sampler, created))
        })?;
        let resource = created.map_err(|message| self.core.refused("create", &message))?;
        let slot = Slot {
            live: Some(Live {
                store,
                sampler,
                resource,
            }),
            ..Slot::default()
        };
        let shared = SessionShared {
            core: self.core.clone(),
            vocabulary,
            waker,
            slot: Mutex::new(slot),
        };
        Ok(Box::new(Session {
            shared: Arc::new(shared),
        }))
    }
}

/// A session's own instance. Dropped without running the guest's destructor: the instance goes as a whole.
struct Live {
    store: Store<StoreState>,
    sampler: Sampler,
    resource: ResourceAny,
}

enum Question {
    Plan(PlanStep),
    Choice(Vec<Candidate>),
}

enum Reply {
    Plan(SamplingPlan),
    Choice(usize),
}

/// Where the engine's thread and a worker meet.
#[derive(Default)]
struct Slot {
    /// The instance, while no question is being answered and none has failed.
    live: Option<Live>,
    /// A question waits or is being answered.
    open: bool,
    /// The answer to the last question, until it is taken.
    answer: Option<Result<Reply, GuestError>>,
    /// The first failure; it answers all later questions.
    failed: Option<GuestError>,
    /// The session is gone: its open question needs no answer.
    closed: bool,
    /// How long its last question took.
    nature: Nature,
}

struct SessionShared {
    core: GuestCore,
    vocabulary: u32,
    waker: Waker,
    // A std Mutex: held for moves only, never while the guest runs.
    slot: Mutex<Slot>,
}

struct Session {
    shared: Arc<SessionShared>,
}

impl Session {
    fn ask(&self, call: &'static str, question: Question) {
        let mut slot = self.shared.slot();
        if slot.open {
            // The first question's answer stands; the engine sees its own mistake in the log.
            self.shared
                .core
                .host_bug(call, "a second question while one is open");
            return;
        }
        if let Some(error) = &slot.failed {
            slot.answer = Some(Err(error.clone()));
            return;
        }
        slot.open = true;
        slot.answer = None;
        let nature = slot.nature;
        drop(slot);
        let shared = Arc::clone(&self.shared);
        if self
            .shared
            .core
            .host
            .workers
            .push(nature, Box::new(move || shared.answer(call, question)))
            .is_err()
        {
            self.shared.queue_full(call);
        }
    }

    /// The answer, if it is there, as `pick` sees it.
    fn take<T>(&self, call: &'static str, pick: impl FnOnce(Reply) -> Option<T>) -> Answer<T> {
        let mut slot = self.shared.slot();
        if slot.open {
            return Answer::Pending;
        }
        let answer = slot.answer.take();
        drop(slot);
        Answer::Ready(match answer {
            Some(Ok(reply)) => {
                pick(reply).ok_or_else(|| self.shared.core.host_bug(call, "took another question's answer"))
            }
            Some(Err(error)) => Err(error),
            None => Err(self
                .shared
                .core
                .host_bug(call, "took an answer without a question")),
        })
    }
}

impl SamplerSession for Session {
    fn request_plan(&mut self, step: PlanStep) {
        self.ask("plan", Question::Plan(step));
    }

    fn take_plan(&mut self) -> Answer<SamplingPlan> {
        self.take("plan", |reply| match reply {
            Reply::Plan(plan) => Some(plan),
            Reply::Choice(_) => None,
        })
    }

    fn request_choice(&mut self, candidates: Vec<Candidate>) {
        self.ask("choose", Question::Choice(candidates));
    }

    fn take_choice(&mut self) -> Answer<usize> {
        self.take("choose", |reply| match reply {
            Reply::Choice(index) => Some(index),
            Reply::Plan(_) => None,
        })
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let mut slot = self.shared.slot();
        slot.closed = true;
        let live = slot.live.take();
        drop(slot);
        // Outside the lock: dropping a store clears its memory.
        drop(live);
    }
}

impl SessionShared {
    fn slot(&self) -> MutexGuard<'_, Slot> {
        // A panic while the lock is held leaves a whole slot: every change is a single assignment.
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// On a worker thread: answers the open question and wakes the engine.
    fn answer(&self, call: &'static str, question: Question) {
        let mut slot = self.slot();
        if slot.closed {
            return;
        }
        let live = slot.live.take();
        drop(slot);
        let begin = Instant::now();
        let (live, answer) = match live {
            Some(mut live) => match self.run(&mut live, call, question) {
                Ok(reply) => (Some(live), Ok(reply)),
                // The store is dropped before anybody hears of the failure, so that its slot is free by then.
                Err(error) => {
                    drop(live);
                    (None, Err(error))
                }
            },
            None => (
                None,
                Err(self
                    .core
                    .host_bug(call, "a session without an instance was asked")),
            ),
        };
        let mut slot = self.slot();
        if slot.closed {
            drop(slot);
            drop(live);
            return;
        }
        slot.failed = answer.as_ref().err().cloned();
        slot.live = live;
        slot.nature = if begin.elapsed() < QUICK_MAX {
            Nature::Quick
        } else {
            Nature::Any
        };
        slot.answer = Some(answer);
        slot.open = false;
        drop(slot);
        (self.waker)();
    }

    fn run(&self, live: &mut Live, call: &'static str, question: Question) -> Result<Reply, GuestError> {
        // A panic below is a bug of the host. It ends this request; the worker and its other sessions go on.
        // Unwind safety: the store is dropped after any error.
        catch_unwind(AssertUnwindSafe(|| match question {
            Question::Plan(step) => self.plan(live, step).map(Reply::Plan),
            Question::Choice(candidates) => self.choose(live, &candidates).map(Reply::Choice),
        }))
        .unwrap_or_else(|_| Err(self.core.host_bug(call, "panic, see standard error")))
    }

    fn plan(&self, live: &mut Live, step: PlanStep) -> Result<SamplingPlan, GuestError> {
        let step = convert::sampling::step(step);
        let Live {
            store,
            sampler,
            resource,
        } = live;
        let plan = self
            .core
            .call(store, "plan", self.core.limits().step_deadline, |store| {
                sampler
                    .galerne_sampling_sampling()
                    .session()
                    .call_plan(store, *resource, &step)
            })?;
        let plan = convert::sampling::plan(plan);
        match plan.check(self.vocabulary, self.core.host.options.candidates_max) {
            Ok(()) => Ok(plan),
            Err(error) => Err(self.plan_error(error)),
        }
    }

    fn choose(&self, live: &mut Live, candidates: &[Candidate]) -> Result<usize, GuestError> {
        let shown = convert::sampling::candidates(candidates);
        let Live {
            store,
            sampler,
            resource,
        } = live;
        let index = self
            .core
            .call(store, "choose", self.core.limits().step_deadline, |store| {
                sampler
                    .galerne_sampling_sampling()
                    .session()
                    .call_choose(store, *resource, &shown)
            })?;
        match usize::try_from(index) {
            Ok(index) if index < candidates.len() => Ok(index),
            _ => Err(self.plan_error(PlanError {
                field: "choose".into(),
                expected: "an index into the candidates".into(),
                got: format!("{index} of {} candidates", candidates.len()),
            })),
        }
    }

    fn plan_error(&self, error: PlanError) -> GuestError {
        self.core.counted(GuestError::Plan {
            guest: self.core.name.to_string(),
            error,
        })
    }

    fn queue_full(&self, call: &'static str) {
        let error = GuestError::Limit {
            guest: self.core.name.to_string(),
            call: call.into(),
            limit: "the queue of questions to guests is full; try again later".to_owned(),
        };
        let mut slot = self.slot();
        slot.open = false;
        slot.answer = Some(Err(error));
    }
}
