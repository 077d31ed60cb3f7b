//! Guests that propose: by what they are told the output will be, or by what the text has said before.

use galerne_core::guest::{Answer, PlanStep, SamplerSession};
use galerne_core::ids::TokenId;
use galerne_core::sampling::{Candidate, SamplingPlan};

/// What comes next, by the output so far.
type Guess = Box<dyn Fn(&[TokenId]) -> Vec<TokenId> + Send>;

/// A guest with one rule for all tokens, that proposes what a function says.
pub struct Proposer {
    rule: SamplingPlan,
    guess: Guess,
    /// Looks before an answer is there, by a small pattern that repeats.
    delays: [u8; 3],
    output: Vec<TokenId>,
    questions: usize,
    looks_left: Option<u8>,
}

impl Proposer {
    pub fn new(
        rule: SamplingPlan,
        delays: [u8; 3],
        guess: impl Fn(&[TokenId]) -> Vec<TokenId> + Send + 'static,
    ) -> Self {
        Self {
            rule,
            guess: Box::new(guess),
            delays,
            output: Vec::new(),
            questions: 0,
            looks_left: None,
        }
    }

    /// Proposes what followed the last time that the last two tokens were seen.
    pub fn by_bigrams(rule: SamplingPlan, delays: [u8; 3], prompt: &[u32]) -> Self {
        let prompt: Vec<_> = prompt.iter().copied().map(TokenId).collect();
        Self::new(rule, delays, move |output| {
            let text = [&prompt, output].concat();
            let last = &text[text.len().saturating_sub(2)..];
            let found = text[..text.len() - 1].windows(2).rposition(|pair| pair == last);
            // What lies between repeats itself for as long as one likes.
            let follows = found.map(|at| text[at + 2..].iter().copied().cycle().take(24).collect());
            follows.unwrap_or_default()
        })
    }
}

impl SamplerSession for Proposer {
    fn request_plan(&mut self, step: PlanStep) {
        assert!(self.looks_left.is_none(), "two questions are open");
        self.output.extend(&step.accepted);
        assert_eq!(self.output.len(), step.position as usize, "feedback is complete");
        self.looks_left = Some(self.delays[self.questions % 3]);
        self.questions += 1;
    }

    fn take_plan(&mut self) -> Answer<SamplingPlan> {
        match self.looks_left {
            None => panic!("an answer is only taken after a question"),
            Some(0) => self.looks_left = None,
            Some(left) => {
                self.looks_left = Some(left - 1);
                return Answer::Pending;
            }
        }
        let proposed = (self.guess)(&self.output);
        Answer::Ready(Ok(SamplingPlan {
            valid_steps: u32::from(proposed.is_empty()),
            proposed,
            ..self.rule.clone()
        }))
    }

    fn request_choice(&mut self, _: Vec<Candidate>) {
        panic!("no candidates were asked for");
    }

    fn take_choice(&mut self) -> Answer<usize> {
        Answer::Pending
    }
}
