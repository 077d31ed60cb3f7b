//! What a sampler is told and answers, between the bindings of `galerne:sampling` and core.

use galerne_core::grammar::GrammarId;
use galerne_core::guest::{PlanStep, SequenceInfo};
use galerne_core::ids::TokenId;
use galerne_core::sampling::{Candidate, SamplingPlan};

use crate::bindings::sampling_0_2::exports::galerne::sampling::sampling as wit;
use crate::sampler::GuestPlan;

fn numbers(tokens: &[TokenId]) -> Vec<u32> {
    tokens.iter().map(|token| token.0).collect()
}

/// To the guest.
pub(crate) fn info(info: &SequenceInfo<'_>) -> wit::SequenceInfo {
    wit::SequenceInfo {
        params_json: info.params_json.to_owned(),
        vocabulary: info.vocabulary,
        prompt: numbers(info.prompt),
        constrained: info.constrained,
        seed: info.seed,
    }
}

/// To the guest.
pub(crate) fn step(step: &PlanStep) -> wit::Step {
    wit::Step {
        position: step.position,
        accepted: numbers(&step.accepted),
    }
}

/// To the guest.
pub(crate) fn candidates(candidates: &[Candidate]) -> Vec<wit::Candidate> {
    candidates
        .iter()
        .map(|candidate| wit::Candidate {
            token: candidate.token.0,
            logprob: candidate.logprob,
        })
        .collect()
}

/// From the guest: foreign numbers, to be checked.
pub(crate) fn plan(plan: wit::Plan) -> GuestPlan {
    GuestPlan {
        plan: SamplingPlan {
            temperature: plan.temperature,
            top_k: plan.top_k,
            top_p: plan.top_p,
            min_p: plan.min_p,
            repetition_penalty: plan.repetition_penalty,
            frequency_penalty: plan.frequency_penalty,
            presence_penalty: plan.presence_penalty,
            bias: plan
                .bias
                .into_iter()
                .map(|bias| (TokenId(bias.token), bias.value))
                .collect(),
            forced: plan.forced.into_iter().map(TokenId).collect(),
            proposed: plan.proposed.into_iter().map(TokenId).collect(),
            valid_steps: plan.valid_steps,
            candidates: plan.candidates,
        },
        grammar: plan.grammar.map(GrammarId),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_of_a_plan_arrives_where_it_belongs() {
        let converted = plan(wit::Plan {
            grammar: Some(16),
            bias: vec![wit::Bias { token: 1, value: 2.0 }],
            repetition_penalty: 3.0,
            frequency_penalty: 4.0,
            presence_penalty: 5.0,
            temperature: 6.0,
            top_k: 7,
            top_p: 8.0,
            min_p: 9.0,
            forced: vec![10, 11],
            proposed: vec![14, 15],
            valid_steps: 12,
            candidates: 13,
        });
        let expected = SamplingPlan {
            temperature: 6.0,
            top_k: 7,
            top_p: 8.0,
            min_p: 9.0,
            repetition_penalty: 3.0,
            frequency_penalty: 4.0,
            presence_penalty: 5.0,
            bias: vec![(TokenId(1), 2.0)],
            forced: vec![TokenId(10), TokenId(11)],
            proposed: vec![TokenId(14), TokenId(15)],
            valid_steps: 12,
            candidates: 13,
        };
        assert_eq!(
            converted,
            GuestPlan {
                plan: expected,
                grammar: Some(GrammarId(16))
            }
        );
    }

    #[test]
    fn a_step_keeps_its_order() {
        let converted = step(&PlanStep {
            position: 5,
            accepted: vec![TokenId(2), TokenId(1)],
        });
        assert_eq!((converted.position, converted.accepted), (5, vec![2, 1]));
    }
}
