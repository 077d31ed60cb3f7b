//! Sampling guests for tests: deterministic in what they answer, arbitrary in when, strict about the protocol.

use galerne_core::grammar::GrammarSession;
use galerne_core::guest::{Answer, GuestError, PlanStep, SamplerSession};
use galerne_core::ids::TokenId;
use galerne_core::sampling::{Candidate, SamplingPlan};

use super::grammar::FakeGrammar;

/// How a guest behaves.
#[derive(Debug, Clone, Copy, Default)]
pub struct Manner {
    /// Looks before an answer is there, by a small pattern that repeats.
    pub delays: [u8; 3],
    /// Steps a plan is valid.
    pub valid_steps: u32,
    /// Candidates it wants; 0 lets the host draw.
    pub candidates: u32,
    /// Every so many plans it forces two tokens; 0 never.
    pub forces_every: u32,
    /// Its plans bring a grammar.
    pub keeps: bool,
    /// It proposes so many tokens; if more than one, every third plan proposes none.
    pub proposes: u32,
    /// It traps at the plan of this position.
    pub traps_at: Option<u32>,
}

/// A session that answers after being looked at some times.
pub struct FakeGuest {
    manner: Manner,
    accepted: Vec<TokenId>,
    questions: usize,
    looks_left: u8,
    plan: Option<PlanStep>,
    choice: Option<Vec<Candidate>>,
}

impl FakeGuest {
    pub fn new(manner: Manner) -> Self {
        Self {
            manner,
            accepted: Vec::new(),
            questions: 0,
            looks_left: 0,
            plan: None,
            choice: None,
        }
    }

    fn ask(&mut self) {
        assert!(
            self.plan.is_none() && self.choice.is_none(),
            "two questions are open"
        );
        self.looks_left = self.manner.delays[self.questions % 3];
        self.questions += 1;
    }

    fn is_late(&mut self) -> bool {
        let late = self.looks_left > 0;
        self.looks_left = self.looks_left.saturating_sub(1);
        late
    }

    fn proposed(&self) -> Vec<TokenId> {
        let count = self.manner.proposes;
        let count = if count > 1 && self.questions.is_multiple_of(3) {
            0
        } else {
            count
        };
        (0..count).map(|i| TokenId((self.history() + i) % 23)).collect()
    }

    fn history(&self) -> u32 {
        self.accepted
            .iter()
            .fold(17, |hash: u32, token| hash.wrapping_mul(31).wrapping_add(token.0))
    }
}

impl SamplerSession for FakeGuest {
    fn request_plan(&mut self, step: PlanStep) {
        self.ask();
        self.accepted.extend(&step.accepted);
        assert_eq!(
            self.accepted.len(),
            step.position as usize,
            "feedback is complete"
        );
        self.plan = Some(step);
    }

    fn take_plan(&mut self) -> Answer<SamplingPlan> {
        if self.plan.is_none() || self.is_late() {
            return Answer::Pending;
        }
        let step = self.plan.take().expect("just looked");
        if self.manner.traps_at.is_some_and(|at| step.position >= at) {
            let (guest, reason) = ("fake".to_owned(), "unreachable".to_owned());
            return Answer::Ready(Err(GuestError::Trap {
                guest,
                call: "plan".into(),
                reason,
            }));
        }
        let every = self.manner.forces_every;
        let forces = every > 0 && step.position.is_multiple_of(every);
        Answer::Ready(Ok(SamplingPlan {
            temperature: 0.5 + (self.history() % 8) as f32 / 8.0,
            forced: if forces {
                vec![TokenId(self.history() % 20), TokenId(2)]
            } else {
                Vec::new()
            },
            proposed: self.proposed(),
            valid_steps: self.manner.valid_steps,
            candidates: self.manner.candidates,
            ..SamplingPlan::default()
        }))
    }

    fn take_grammar(&mut self) -> Option<Box<dyn GrammarSession>> {
        self.manner.keeps.then(|| -> Box<dyn GrammarSession> {
            Box::new(FakeGrammar::after(self.accepted.clone(), self.manner.delays))
        })
    }

    fn request_choice(&mut self, candidates: Vec<Candidate>) {
        self.ask();
        self.choice = Some(candidates);
    }

    fn take_choice(&mut self) -> Answer<usize> {
        if self.choice.is_none() || self.is_late() {
            return Answer::Pending;
        }
        let candidates = self.choice.take().expect("just looked");
        Answer::Ready(Ok(candidates[0].token.0 as usize % candidates.len()))
    }
}
