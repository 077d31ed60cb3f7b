//! A loaded sampling guest and its sessions, whose questions are answered on the worker threads.
//! Knows nothing of logits and how a plan is executed.

mod versions;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use galerne_core::capability::CapabilitySession;
use galerne_core::grammar::{GrammarId, GrammarSession};
use galerne_core::guest::{
    Answer, GuestError, PlanStep, SamplerFactory, SamplerSession, SequenceInfo, Waker,
};
use galerne_core::sampling::{Candidate, PlanError, SamplingPlan};
use serde::{Deserialize, Serialize};
use wasmtime::Store;
use wasmtime::component::{InstancePre, ResourceAny};

use crate::capability::GRAMMARS;
use crate::grammar::desk::{Desk, not_held};
use crate::inspect;
use crate::instance::GuestCore;
use crate::limiter::StoreState;
use crate::question::Question;
use crate::workers::{Nature, QUICK_MAX};
use versions::{Linked, Sampler};

/// A guest's plan as it comes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct GuestPlan {
    pub(crate) plan: SamplingPlan,
    /// The grammar it names.
    pub(crate) grammar: Option<GrammarId>,
}

/// A plan that can be executed.
pub(crate) struct Planned {
    pub(crate) plan: SamplingPlan,
    pub(crate) grammar: Option<Box<dyn GrammarSession>>,
}

/// Who answers what a guest asks of its grammars.
pub(crate) enum Grammars {
    /// Nobody: it may not ask.
    None,
    /// This process.
    Here(Arc<Desk>),
    /// The host of this cell, which also finds what plans name.
    Host(Box<dyn CapabilitySession>),
}

/// A guest of the world `galerne:sampling/sampler`. Each session has its own instance. Cloning is cheap.
#[derive(Clone)]
pub(crate) struct SamplerGuest {
    core: GuestCore,
    linked: Arc<Linked>,
    /// Whether it imports grammars.
    asks: bool,
}

impl SamplerGuest {
    pub(crate) fn new(core: GuestCore, pre: InstancePre<StoreState>) -> Result<Self, GuestError> {
        let imports = inspect::imports(&core.host.engine, pre.component());
        Ok(Self {
            asks: imports.iter().any(|import| import == GRAMMARS),
            linked: Arc::new(Linked::new(&core, pre)?),
            core,
        })
    }

    /// A session whose guest asks what it asks of `grammars`.
    pub(crate) fn open(
        &self,
        info: &SequenceInfo<'_>,
        grammars: Grammars,
        waker: Waker,
    ) -> Result<Session, GuestError> {
        let mut store = self.core.store();
        let (desk, asked, waits) = match grammars {
            _ if !self.asks => (None, None, false),
            Grammars::None => (None, None, false),
            Grammars::Here(desk) => (Some(Arc::clone(&desk)), Some(desk.asked()), false),
            Grammars::Host(asked) => (None, Some(asked), true),
        };
        store.data_mut().asking().set_session(asked);
        let limit = self.core.limits().request_deadline;
        let (sampler, created) = self.core.call(&mut store, "create", limit, |store| {
            let sampler = self.linked.instantiate(store)?;
            let created = sampler.create(store, info)?;
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
            vocabulary: info.vocabulary,
            desk,
            waits,
            waker,
            slot: Mutex::new(slot),
        };
        Ok(Session {
            shared: Arc::new(shared),
            grammar: None,
        })
    }
}

impl SamplerFactory for SamplerGuest {
    fn session(&self, info: &SequenceInfo<'_>, waker: Waker) -> Result<Box<dyn SamplerSession>, GuestError> {
        let desk = desk(&self.core, info, &waker);
        let grammars = desk.map_or(Grammars::None, Grammars::Here);
        Ok(Box::new(self.open(info, grammars, waker)?))
    }
}

/// Who answers a guest's questions about grammars, if it may have any.
pub(crate) fn desk(core: &GuestCore, info: &SequenceInfo<'_>, waker: &Waker) -> Option<Arc<Desk>> {
    let factory = info.grammars.filter(|_| core.grants().grammar)?;
    let allowance = Arc::clone(&core.allowance);
    Some(Desk::new(Arc::clone(factory), allowance, Arc::clone(waker)))
}

/// Checks a guest's plan, and finds the grammar it names.
pub(crate) fn planned(
    core: &GuestCore,
    vocabulary: u32,
    desk: Option<&Arc<Desk>>,
    guest: GuestPlan,
) -> Result<Planned, GuestError> {
    let GuestPlan { plan, grammar } = guest;
    let checked = plan.check(vocabulary, core.host.options.candidates_max);
    let grammar = checked.and_then(|()| match (grammar, desk) {
        (None, _) => Ok(None),
        (Some(id), Some(desk)) => desk.named(id).map(Some),
        (Some(id), None) => Err(not_held(id)),
    });
    match grammar {
        Ok(grammar) => Ok(Planned { plan, grammar }),
        Err(error) => Err(plan_error(core, error)),
    }
}

/// The guest's plan or choice cannot be executed.
pub(crate) fn plan_error(core: &GuestCore, error: PlanError) -> GuestError {
    core.counted(GuestError::Plan {
        guest: core.name.to_string(),
        error,
    })
}

/// A session's own instance. Dropped without running the guest's destructor: the instance goes as a whole.
struct Live {
    store: Store<StoreState>,
    sampler: Sampler,
    resource: ResourceAny,
}

enum Ask {
    Plan(PlanStep),
    Choice(Vec<Candidate>),
}

enum Reply {
    Plan(Planned),
    /// In a cell, whose host finds the grammar it names.
    GuestPlan(GuestPlan),
    Choice(usize),
}

/// Where the engine's thread and a worker meet.
#[derive(Default)]
struct Slot {
    /// The instance, while no question is being answered and none has failed.
    live: Option<Live>,
    question: Question<Reply>,
    /// The session is gone: its open question needs no answer.
    closed: bool,
    /// How long its last question took.
    nature: Nature,
}

struct SessionShared {
    core: GuestCore,
    vocabulary: u32,
    desk: Option<Arc<Desk>>,
    /// Whether the guest may wait for the host of this cell, which must not keep whoever hears the host.
    waits: bool,
    waker: Waker,
    // A std Mutex: held for moves only, never while the guest runs.
    slot: Mutex<Slot>,
}

/// A sampler's session in this process.
pub(crate) struct Session {
    shared: Arc<SessionShared>,
    /// What the plan just taken brings.
    grammar: Option<Box<dyn GrammarSession>>,
}

impl Session {
    fn ask(&self, call: &'static str, ask: Ask) {
        let mut slot = self.shared.slot();
        if !slot.question.ask(&self.shared.core, call) {
            return;
        }
        let nature = if self.shared.waits {
            Nature::Any
        } else {
            slot.nature
        };
        drop(slot);
        let shared = Arc::clone(&self.shared);
        if self
            .shared
            .core
            .host
            .workers
            .push(nature, Box::new(move || shared.answer(call, ask)))
            .is_err()
        {
            self.shared.queue_full(call);
        }
    }

    /// In a cell: the plan as it came.
    pub(crate) fn take_guest_plan(&mut self) -> Answer<GuestPlan> {
        self.take("plan", |reply| match reply {
            Reply::GuestPlan(plan) => Some(plan),
            Reply::Plan(Planned { plan, .. }) => Some(GuestPlan { plan, grammar: None }),
            Reply::Choice(_) => None,
        })
    }

    /// The answer, if it is there, as `pick` sees it.
    fn take<T>(&self, call: &'static str, pick: impl FnOnce(Reply) -> Option<T>) -> Answer<T> {
        self.shared.slot().question.take(&self.shared.core, call, pick)
    }
}

impl SamplerSession for Session {
    fn request_plan(&mut self, step: PlanStep) {
        if let Some(desk) = &self.shared.desk {
            desk.drawn(&step.accepted);
        }
        self.ask("plan", Ask::Plan(step));
    }

    fn take_plan(&mut self) -> Answer<SamplingPlan> {
        let planned = self.take("plan", |reply| match reply {
            Reply::Plan(planned) => Some(planned),
            Reply::GuestPlan(_) | Reply::Choice(_) => None,
        });
        match planned {
            Answer::Pending => Answer::Pending,
            Answer::Ready(planned) => Answer::Ready(planned.map(|Planned { plan, grammar }| {
                self.grammar = grammar;
                plan
            })),
        }
    }

    fn take_grammar(&mut self) -> Option<Box<dyn GrammarSession>> {
        self.grammar.take()
    }

    fn request_choice(&mut self, candidates: Vec<Candidate>) {
        self.ask("choose", Ask::Choice(candidates));
    }

    fn take_choice(&mut self) -> Answer<usize> {
        self.take("choose", |reply| match reply {
            Reply::Choice(index) => Some(index),
            Reply::Plan(_) | Reply::GuestPlan(_) => None,
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
    fn answer(&self, call: &'static str, ask: Ask) {
        let mut slot = self.slot();
        if slot.closed {
            return;
        }
        let live = slot.live.take();
        drop(slot);
        let (live, answer) = match live {
            Some(mut live) => match self.run(&mut live, call, ask) {
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
        slot.nature = match &live {
            Some(live) if live.store.data().last_call < QUICK_MAX => Nature::Quick,
            _ => Nature::Any,
        };
        slot.live = live;
        slot.question.answer(answer);
        drop(slot);
        (self.waker)();
    }

    fn run(&self, live: &mut Live, call: &'static str, ask: Ask) -> Result<Reply, GuestError> {
        // A panic below is a bug of the host. It ends this request; the worker and its other sessions go on.
        // Unwind safety: the store is dropped after any error.
        catch_unwind(AssertUnwindSafe(|| match ask {
            Ask::Plan(step) => self.plan(live, &step),
            Ask::Choice(candidates) => self.choose(live, &candidates).map(Reply::Choice),
        }))
        .unwrap_or_else(|_| Err(self.core.host_bug(call, "panic, see standard error")))
    }

    fn plan(&self, live: &mut Live, step: &PlanStep) -> Result<Reply, GuestError> {
        let Live {
            store,
            sampler,
            resource,
        } = live;
        let limit = self.core.limits().step_deadline;
        let plan = self
            .core
            .call(store, "plan", limit, |store| sampler.plan(store, *resource, step))?;
        // The host of a cell checks what comes out of it, whatever was checked inside.
        if self.waits {
            return Ok(Reply::GuestPlan(plan));
        }
        planned(&self.core, self.vocabulary, self.desk.as_ref(), plan).map(Reply::Plan)
    }

    fn choose(&self, live: &mut Live, candidates: &[Candidate]) -> Result<usize, GuestError> {
        let Live {
            store,
            sampler,
            resource,
        } = live;
        let limit = self.core.limits().step_deadline;
        let index = self.core.call(store, "choose", limit, |store| {
            sampler.choose(store, *resource, candidates)
        })?;
        match usize::try_from(index) {
            Ok(index) if index < candidates.len() => Ok(index),
            _ => Err(plan_error(
                &self.core,
                PlanError {
                    field: "choose".into(),
                    expected: "an index into the candidates".into(),
                    got: format!("{index} of {} candidates", candidates.len()),
                },
            )),
        }
    }

    fn queue_full(&self, call: &'static str) {
        let error = GuestError::Limit {
            guest: self.core.name.to_string(),
            call: call.into(),
            limit: "the queue of questions to guests is full; try again later".to_owned(),
        };
        self.slot().question.refuse(error);
    }
}
