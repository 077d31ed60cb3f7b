//! One sequence's sampling state: its plan, its guest's open question, its token counts and its randomness.
//! Never waits: a late guest is only reported. Knows nothing of blocks or batches.

use std::collections::HashMap;

use galerne_core::guest::{Answer, PlanStep, SamplerSession};
use galerne_core::ids::TokenId;
use galerne_core::sampling::TokenLogprobs;
use galerne_core::sampling::{Candidate, PlanError, SamplingPlan};
use galerne_kernels::device::TokenCount;

use crate::constraint::Constraint;
use crate::request::{Sampling, SequenceError};

/// What checks a guest's plan.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PlanBounds {
    pub(crate) vocabulary: u32,
    pub(crate) candidates_max: usize,
    /// Whether the request has a grammar: then a plan brings none.
    pub(crate) constrained: bool,
}

/// What became of a guest's open question.
#[derive(Debug, PartialEq)]
pub(crate) enum Polled {
    /// None is open.
    Idle,
    /// It is not answered.
    Pending,
    /// The plan has come and is in force.
    Plan,
    /// The guest has chosen the next token.
    Choice {
        token: TokenId,
        logprobs: Option<TokenLogprobs>,
    },
}

/// The sampling state of one sequence.
pub(crate) struct Sampler {
    active: Option<ActivePlan>,
    guest: Option<Guest>,
    seen: Option<Seen>,
}

struct ActivePlan {
    plan: SamplingPlan,
    /// Tokens drawn by it.
    used_steps: usize,
    /// One of them was not the one it had guessed.
    is_refuted: bool,
    /// What it keeps the output to.
    constraint: Option<Constraint>,
}

impl ActivePlan {
    fn new(plan: SamplingPlan, constraint: Option<Constraint>) -> Self {
        Self {
            plan,
            used_steps: 0,
            is_refuted: false,
            constraint,
        }
    }

    /// Whether the guest is asked again. All forced tokens come even if the plan is valid for fewer steps:
    /// "these tokens come next, in order" would be broken otherwise. A plan that proposes ends with the first token that it
    /// has not guessed.
    fn expired(&self) -> bool {
        let (valid, guesses) = (self.plan.valid_steps as usize, self.plan.guesses().len());
        let is_over = valid > 0 && self.used_steps >= valid.max(self.plan.forced.len());
        is_over || guesses > 0 && (self.is_refuted || self.used_steps > guesses)
    }

    /// Guesses at the tokens that follow the last one: no more than leave the draw behind them to this plan.
    fn guesses(&self) -> &[TokenId] {
        let left = match self.plan.valid_steps as usize {
            _ if self.is_refuted => 0,
            0 => usize::MAX,
            valid => valid.saturating_sub(self.used_steps + 1),
        };
        let guesses = self.plan.guesses().get(self.used_steps..).unwrap_or_default();
        &guesses[..guesses.len().min(left)]
    }

    fn accept(&mut self, token: TokenId) {
        let guess = self.plan.guesses().get(self.used_steps);
        self.is_refuted |= guess.is_some_and(|guess| *guess != token);
        self.used_steps += 1;
        if let Some(constraint) = &mut self.constraint {
            constraint.accept(token);
        }
    }
}

struct Guest {
    session: Box<dyn SamplerSession>,
    question: Question,
    /// Output tokens since the last plan was asked for.
    accepted: Vec<TokenId>,
    /// It has proposed, and was not late since.
    proposes: bool,
    /// The open question was asked before the step it is for.
    is_ahead: bool,
}

enum Question {
    None,
    Plan,
    Choice(Vec<Candidate>),
}

impl Sampler {
    pub(crate) fn new(sampling: Sampling) -> Self {
        let (active, guest) = match sampling {
            Sampling::Plan(mut plan) => {
                // Nobody could be asked again.
                plan.valid_steps = 0;
                (Some(ActivePlan::new(plan, None)), None)
            }
            Sampling::Guest(session) => (
                None,
                Some(Guest {
                    session,
                    question: Question::None,
                    accepted: Vec::new(),
                    proposes: false,
                    is_ahead: false,
                }),
            ),
        };
        Self {
            active,
            guest,
            seen: None,
        }
    }

    /// The plan in force.
    pub(crate) fn plan(&self) -> Option<&SamplingPlan> {
        self.active.as_ref().map(|active| &active.plan)
    }

    /// The grammar of the plan in force, if it brings one.
    pub(crate) fn constraint(&self) -> Option<&Constraint> {
        self.active.as_ref()?.constraint.as_ref()
    }

    /// The same, to ask it.
    pub(crate) fn constraint_mut(&mut self) -> Option<&mut Constraint> {
        self.active.as_mut()?.constraint.as_mut()
    }

    /// The token the plan forces next.
    pub(crate) fn forced(&self) -> Option<TokenId> {
        self.active
            .as_ref()
            .and_then(|active| active.plan.forced.get(active.used_steps).copied())
    }

    /// Whether this plan draws the next token and the one behind it, without having to know the first.
    pub(crate) fn draws_the_next_too(&self) -> bool {
        self.active.as_ref().is_some_and(|active| {
            let (plan, used) = (&active.plan, active.used_steps);
            let valid = plan.valid_steps as usize;
            let knows_no_token = plan.candidates == 0 && !plan.has_penalties() && plan.guesses().is_empty();
            knows_no_token && used >= plan.forced.len() && (valid == 0 || used + 2 <= valid)
        })
    }

    /// What the plan in force believes to follow the last token, as far as it draws there.
    pub(crate) fn guesses(&self) -> &[TokenId] {
        self.active.as_ref().map_or(&[], ActivePlan::guesses)
    }

    /// Whether the guest has candidates before it: the next token is known to nobody else.
    pub(crate) fn awaits_choice(&self) -> bool {
        matches!(
            &self.guest,
            Some(Guest {
                question: Question::Choice(_),
                ..
            })
        )
    }

    /// Whether a plan was asked for and has not come.
    pub(crate) fn awaits_plan(&self) -> bool {
        matches!(
            &self.guest,
            Some(Guest {
                question: Question::Plan,
                ..
            })
        )
    }

    /// Asks the guest for a plan if none is in force and no question is open.
    pub(crate) fn ask_plan(&mut self, position: u32) {
        if self.active.is_some() {
            return;
        }
        if let Some(guest) = &mut self.guest
            && matches!(guest.question, Question::None)
        {
            let accepted = std::mem::take(&mut guest.accepted);
            guest.session.request_plan(PlanStep { position, accepted });
            guest.question = Question::Plan;
        }
    }

    /// Asks a guest that proposes before the next step is put together. Whether it was asked.
    pub(crate) fn ask_ahead(&mut self, position: u32) -> bool {
        let proposes = self.guest.as_ref().is_some_and(|guest| guest.proposes);
        if !proposes || self.awaits_plan() {
            return false;
        }
        self.ask_plan(position);
        let is_asked = self.awaits_plan();
        if let Some(guest) = &mut self.guest {
            guest.is_ahead = is_asked;
        }
        is_asked
    }

    /// Whether the open question was asked before the step it is for.
    pub(crate) fn was_asked_ahead(&self) -> bool {
        self.guest.as_ref().is_some_and(|guest| guest.is_ahead)
    }

    /// The next token's step begins. A guest that was asked ahead and is not done is not waited for between steps again until
    /// it proposes again.
    pub(crate) fn begin_step(&mut self) {
        if let Some(guest) = &mut self.guest
            && std::mem::take(&mut guest.is_ahead)
        {
            guest.proposes &= !matches!(guest.question, Question::Plan);
        }
    }

    /// Shows the guest candidates.
    pub(crate) fn ask_choice(&mut self, candidates: Vec<Candidate>) {
        if let Some(guest) = &mut self.guest {
            guest.session.request_choice(candidates.clone());
            guest.question = Question::Choice(candidates);
        }
    }

    /// Lets the open question leave, if there is one.
    pub(crate) fn flush(&mut self) {
        if let Some(guest) = &mut self.guest
            && !matches!(guest.question, Question::None)
        {
            guest.session.flush();
        }
    }

    /// Takes in what has come for the open question. Whether there is one.
    pub(crate) fn hear(&mut self) -> bool {
        let Some(guest) = &mut self.guest else {
            return false;
        };
        let is_open = !matches!(guest.question, Question::None);
        if is_open {
            guest.session.hear();
        }
        is_open
    }

    /// Looks whether the open question is answered. `logprobs` is the request's.
    ///
    /// # Errors
    /// The guest failed, or its answer cannot be used.
    pub(crate) fn poll(
        &mut self,
        bounds: PlanBounds,
        logprobs: Option<u32>,
    ) -> Result<Polled, SequenceError> {
        let Some(guest) = &mut self.guest else {
            return Ok(Polled::Idle);
        };
        match &guest.question {
            Question::None => Ok(Polled::Idle),
            Question::Plan => match guest.session.take_plan() {
                Answer::Pending => Ok(Polled::Pending),
                Answer::Ready(plan) => {
                    let plan = plan?;
                    plan.check(bounds.vocabulary, bounds.candidates_max)?;
                    let mut constraint = guest.session.take_grammar().map(Constraint::new);
                    if let Some(constraint) = &mut constraint {
                        if bounds.constrained {
                            return Err(second_grammar().into());
                        }
                        // The plan has come for a token that is about to be drawn.
                        constraint.ask();
                    }
                    guest.question = Question::None;
                    guest.proposes |= !plan.guesses().is_empty() && constraint.is_none();
                    self.active = Some(ActivePlan::new(plan, constraint));
                    Ok(Polled::Plan)
                }
            },
            Question::Choice(candidates) => match guest.session.take_choice() {
                Answer::Pending => Ok(Polled::Pending),
                Answer::Ready(choice) => {
                    let (choice, shown) = (choice?, candidates.len());
                    let chosen = *candidates.get(choice).ok_or(SequenceError::Choice {
                        candidates: shown,
                        choice,
                    })?;
                    let logprobs = logprobs.map(|top| TokenLogprobs {
                        logprob: chosen.logprob,
                        top: candidates.iter().take(top as usize).copied().collect(),
                    });
                    guest.question = Question::None;
                    Ok(Polled::Choice {
                        token: chosen.token,
                        logprobs,
                    })
                }
            },
        }
    }

    /// Takes note of an output token: feedback, counts, and the plan's age.
    pub(crate) fn accept(&mut self, token: TokenId) {
        if let Some(guest) = &mut self.guest {
            guest.accepted.push(token);
        }
        if let Some(seen) = &mut self.seen {
            seen.output(token);
        }
        if let Some(active) = &mut self.active {
            active.accept(token);
            // Without a guest nobody could be asked again.
            if self.guest.is_some() && active.expired() {
                self.active = None;
            }
        }
    }

    /// Counts tokens if the plan in force has penalties; from then on they are counted as they come.
    pub(crate) fn prepare_seen(&mut self, tokens: &[TokenId], prompt_tokens: usize) {
        if self.seen.is_none() && self.plan().is_some_and(SamplingPlan::has_penalties) {
            self.seen = Some(Seen::new(tokens, prompt_tokens));
        }
    }

    /// Distinct tokens of prompt and output if the plan in force has penalties, else nothing.
    pub(crate) fn seen(&self) -> &[TokenCount] {
        match &self.seen {
            Some(seen) if self.plan().is_some_and(SamplingPlan::has_penalties) => &seen.counts,
            _ => &[],
        }
    }
}

/// Whichever won, one of the two would be broken without a word.
fn second_grammar() -> PlanError {
    PlanError {
        field: "grammar".into(),
        expected: "none where the request has its own (response_format and the like)".into(),
        got: "one".to_owned(),
    }
}

/// Token counts in order of first appearance.
struct Seen {
    counts: Vec<TokenCount>,
    places: HashMap<TokenId, usize>,
}

impl Seen {
    fn new(tokens: &[TokenId], prompt_tokens: usize) -> Self {
        let mut seen = Self {
            counts: Vec::new(),
            places: HashMap::new(),
        };
        for token in &tokens[..prompt_tokens] {
            seen.entry(*token);
        }
        for token in &tokens[prompt_tokens..] {
            seen.output(*token);
        }
        seen
    }

    fn entry(&mut self, token: TokenId) -> &mut TokenCount {
        let place = *self.places.entry(token).or_insert_with(|| {
            self.counts.push(TokenCount { token, output: 0 });
            self.counts.len() - 1
        });
        &mut self.counts[place]
    }

    fn output(&mut self, token: TokenId) {
        self.entry(token).output += 1;
    }
}

/// A uniform number in `[0, 1)` from the engine's seed, the request's seed and the output position alone, so
/// that batching, preemption and restarts change no draw. splitmix64 (Steele, Lea, Flood 2014), chained.
pub(crate) fn uniform(engine_seed: u64, request_seed: u64, position: u64) -> f32 {
    let bits = splitmix64(splitmix64(splitmix64(engine_seed) ^ request_seed) ^ position);
    // 24 bits are all an f32 below 1 can hold evenly.
    #[expect(clippy::cast_precision_loss, reason = "24 bits fit an f32's mantissa")]
    let fraction = (bits >> 40) as f32 / (1_u32 << 24) as f32;
    fraction
}

fn splitmix64(state: u64) -> u64 {
    let mut z = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn forced(tokens: &[u32], valid_steps: u32) -> SamplingPlan {
        SamplingPlan {
            forced: tokens.iter().copied().map(TokenId).collect(),
            valid_steps,
            ..SamplingPlan::default()
        }
    }

    #[test]
    fn forced_tokens_come_in_order_and_outlive_a_short_validity() {
        let mut active = ActivePlan::new(forced(&[5, 6], 1), None);
        active.accept(TokenId(5));
        assert!(!active.expired());
        active.accept(TokenId(6));
        assert!(active.expired());
        let mut sampler = Sampler::new(Sampling::Plan(forced(&[5, 6], 1)));
        for expected in [Some(5), Some(6), None, None] {
            assert_eq!(sampler.forced(), expected.map(TokenId));
            sampler.accept(TokenId(9));
        }
        assert!(sampler.plan().is_some(), "a request's own plan never expires");
    }

    #[test]
    fn a_plan_that_proposes_ends_with_the_first_token_it_has_not_guessed() {
        let plan = |valid_steps| SamplingPlan {
            proposed: [5, 6, 7].map(TokenId).to_vec(),
            valid_steps,
            ..SamplingPlan::default()
        };
        let check = |valid_steps, tokens: &[u32], guesses: &[usize]| {
            let mut active = ActivePlan::new(plan(valid_steps), None);
            let mut left = vec![active.guesses().len()];
            for (place, token) in tokens.iter().enumerate() {
                assert!(!active.expired(), "{tokens:?} after {place}");
                active.accept(TokenId(*token));
                left.push(active.guesses().len());
            }
            assert!(active.expired(), "{tokens:?}");
            assert_eq!(left, guesses, "{tokens:?}");
        };
        check(0, &[5, 6, 7, 1], &[3, 2, 1, 0, 0]);
        check(0, &[5, 1], &[3, 2, 0]);
        check(9, &[1], &[3, 0]);
        check(3, &[5, 6, 7], &[2, 1, 0, 0]);
        check(1, &[5], &[0, 0]);
        let has_penalty = SamplingPlan {
            presence_penalty: 0.5,
            ..plan(2)
        };
        assert!(ActivePlan::new(has_penalty, None).guesses().is_empty());
    }

    #[test]
    fn counts_are_the_same_whether_kept_or_made_late() {
        let plan = SamplingPlan {
            presence_penalty: 1.0,
            ..SamplingPlan::default()
        };
        let tokens: Vec<_> = [1, 2, 1, 3, 2, 2].map(TokenId).to_vec();
        let mut early = Sampler::new(Sampling::Plan(plan.clone()));
        early.prepare_seen(&tokens[..3], 3);
        tokens[3..].iter().for_each(|token| early.accept(*token));
        let mut late = Sampler::new(Sampling::Plan(plan));
        late.prepare_seen(&tokens, 3);
        assert_eq!(early.seen(), late.seen());
        let counts: Vec<_> = late.seen().iter().map(|c| (c.token.0, c.output)).collect();
        assert_eq!(counts, [(1, 0), (2, 2), (3, 1)]);
    }

    #[test]
    fn uniform_numbers_are_even_and_depend_on_every_seed() {
        let mean = (0..4_096).map(|p| f64::from(uniform(1, 2, p))).sum::<f64>() / 4_096.0;
        assert!((mean - 0.5).abs() < 0.02, "mean of 4096 uniform numbers: {mean}");
        assert!((0..4_096).all(|p| (0.0..1.0).contains(&uniform(3, 4, p))));
        let all = [
            uniform(1, 2, 3),
            uniform(2, 2, 3),
            uniform(1, 3, 3),
            uniform(1, 2, 4),
        ];
        for (i, a) in all.iter().enumerate() {
            assert!(all[i + 1..].iter().all(|b| a != b), "{all:?}");
        }
    }
}
