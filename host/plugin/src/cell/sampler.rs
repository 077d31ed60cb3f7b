//! Samplers in a cell, as the traits of core. A question goes out with the others of the step and its answer comes on the
//! thread that reads the cell's socket. Plans and choices are checked here, whatever the cell has checked.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use galerne_core::grammar::GrammarSession;
use galerne_core::guest::{
    Answer, GuestError, PlanStep, SamplerFactory, SamplerSession, SequenceInfo, Waker,
};
use galerne_core::sampling::{Candidate, PlanError, SamplingPlan};

use super::guests::{CellGuest, CellSession};
use super::outbox::WhenFull;
use super::protocol::{Call, Failure, Reply};
use crate::grammar::desk::Desk;
use crate::question::Question;
use crate::sampler::{Planned, desk, plan_error, planned};

/// A sampler in a cell.
pub(crate) struct CellSampler(pub(crate) Arc<CellGuest>);

impl SamplerFactory for CellSampler {
    fn session(&self, info: &SequenceInfo<'_>, waker: Waker) -> Result<Box<dyn SamplerSession>, GuestError> {
        let Self(guest) = self;
        let desk = desk(&guest.core, info, &waker);
        let asked = desk.as_ref().map(|desk| Arc::new(Mutex::new(desk.asked())));
        let open = |session| Call::Sampler {
            guest: guest.id,
            session,
            params_json: info.params_json.to_owned(),
            vocabulary: info.vocabulary,
            seed: info.seed,
            prompt: info.prompt.to_vec(),
            constrained: info.constrained,
        };
        let session = guest
            .open("create", asked, open)
            .map_err(|failure| guest.failure("create", failure))?;
        let shared = Shared {
            guest: Arc::clone(guest),
            vocabulary: info.vocabulary,
            desk,
            waker,
            question: Mutex::default(),
        };
        Ok(Box::new(Session {
            session,
            shared: Arc::new(shared),
            grammar: None,
        }))
    }
}

/// What a question may give, checked.
enum Given {
    Plan(Planned),
    Choice(usize),
}

/// Where the engine's thread and the one that reads meet.
struct Shared {
    guest: Arc<CellGuest>,
    vocabulary: u32,
    desk: Option<Arc<Desk>>,
    waker: Waker,
    // A std Mutex: held for moves only.
    question: Mutex<Question<Given>>,
}

struct Session {
    session: CellSession,
    shared: Arc<Shared>,
    /// What the plan just taken brings.
    grammar: Option<Box<dyn GrammarSession>>,
}

impl Shared {
    fn question(&self) -> MutexGuard<'_, Question<Given>> {
        // A panic while the lock is held leaves a whole question: every change is a few assignments.
        self.question.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// On the thread that reads, or at once if the question could not be sent.
    fn answered(&self, call: &'static str, candidates: usize, result: Result<Reply, Failure>) {
        let answer = match result {
            Ok(reply) => self.checked(call, candidates, reply),
            Err(failure) => Err(self.guest.failure(call, failure)),
        };
        self.question().answer(answer);
        (self.waker)();
    }

    fn checked(&self, call: &'static str, candidates: usize, reply: Reply) -> Result<Given, GuestError> {
        let core = &self.guest.core;
        match (call, reply) {
            ("plan", Reply::Plan(plan)) => {
                planned(core, self.vocabulary, self.desk.as_ref(), plan).map(Given::Plan)
            }
            ("choose", Reply::Choice(index)) => match usize::try_from(index) {
                Ok(index) if index < candidates => Ok(Given::Choice(index)),
                _ => Err(plan_error(
                    core,
                    PlanError {
                        field: "choose".into(),
                        expected: "an index into the candidates".into(),
                        got: format!("{index} of {candidates} candidates"),
                    },
                )),
            },
            _ => Err(core.bad_answer(call, "this call's answer", "another call's")),
        }
    }
}

impl Session {
    fn ask(&self, name: &'static str, candidates: usize, call: Call) {
        if !self.shared.question().ask(&self.shared.guest.core, name) {
            return;
        }
        let shared = Arc::clone(&self.shared);
        let sink = Box::new(move |result| shared.answered(name, candidates, result));
        let deadline = self.shared.guest.core.limits().step_deadline;
        self.session
            .connection
            .send(call, deadline, WhenFull::Refuse, sink);
    }

    /// The answer, if it is there, as `pick` sees it.
    fn take<T>(&self, call: &'static str, pick: impl FnOnce(Given) -> Option<T>) -> Answer<T> {
        self.shared.question().take(&self.shared.guest.core, call, pick)
    }
}

impl SamplerSession for Session {
    fn request_plan(&mut self, step: PlanStep) {
        if let Some(desk) = &self.shared.desk {
            desk.drawn(&step.accepted);
        }
        self.ask("plan", 0, Call::Plan(self.session.id, step));
    }

    fn take_plan(&mut self) -> Answer<SamplingPlan> {
        let planned = self.take("plan", |given| match given {
            Given::Plan(planned) => Some(planned),
            Given::Choice(_) => None,
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

    fn flush(&mut self) {
        self.session.connection.flush();
    }

    fn hear(&mut self) {
        self.session.connection.hear_answers();
    }

    fn request_choice(&mut self, candidates: Vec<Candidate>) {
        let shown = candidates.len();
        self.ask("choose", shown, Call::Choose(self.session.id, candidates));
    }

    fn take_choice(&mut self) -> Answer<usize> {
        self.take("choose", |given| match given {
            Given::Choice(index) => Some(index),
            Given::Plan(_) => None,
        })
    }
}
