//! What a sampler of `galerne:sampling@0.1.0` is told and answers. It knows no prompt, names no grammar and proposes nothing.

use galerne_core::guest::{PlanStep, SequenceInfo};
use galerne_core::sampling::Candidate;

use super::sampling;
use crate::bindings::sampling_0_1::exports::galerne::sampling::sampling as wit;
use crate::bindings::sampling_0_2::exports::galerne::sampling::sampling as next;
use crate::sampler::GuestPlan;

/// To the guest.
pub(crate) fn info(info: &SequenceInfo<'_>) -> wit::SequenceInfo {
    wit::SequenceInfo {
        params_json: info.params_json.to_owned(),
        vocabulary: info.vocabulary,
        seed: info.seed,
    }
}

/// To the guest.
pub(crate) fn step(step: &PlanStep) -> wit::Step {
    let next::Step { position, accepted } = sampling::step(step);
    wit::Step { position, accepted }
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
    let bias = |bias: wit::Bias| next::Bias {
        token: bias.token,
        value: bias.value,
    };
    sampling::plan(next::Plan {
        grammar: None,
        bias: plan.bias.into_iter().map(bias).collect(),
        repetition_penalty: plan.repetition_penalty,
        frequency_penalty: plan.frequency_penalty,
        presence_penalty: plan.presence_penalty,
        temperature: plan.temperature,
        top_k: plan.top_k,
        top_p: plan.top_p,
        min_p: plan.min_p,
        forced: plan.forced,
        proposed: Vec::new(),
        valid_steps: plan.valid_steps,
        candidates: plan.candidates,
    })
}

#[cfg(test)]
mod tests {
    use galerne_core::ids::TokenId;

    use super::*;

    #[test]
    fn every_field_of_a_plan_arrives_where_it_belongs() {
        let GuestPlan { plan, grammar } = plan(wit::Plan {
            bias: vec![wit::Bias { token: 1, value: 2.0 }],
            repetition_penalty: 3.0,
            frequency_penalty: 4.0,
            presence_penalty: 5.0,
            temperature: 6.0,
            top_k: 7,
            top_p: 8.0,
            min_p: 9.0,
            forced: vec![10, 11],
            valid_steps: 12,
            candidates: 13,
        });
        assert_eq!(grammar, None);
        assert_eq!(plan.proposed, []);
        assert_eq!(plan.bias, [(TokenId(1), 2.0)]);
        assert_eq!(plan.forced, [TokenId(10), TokenId(11)]);
        let penalties = [
            plan.repetition_penalty,
            plan.frequency_penalty,
            plan.presence_penalty,
        ];
        assert_eq!(penalties, [3.0, 4.0, 5.0]);
        assert_eq!(
            (plan.temperature, plan.top_k, plan.top_p, plan.min_p),
            (6.0, 7, 8.0, 9.0)
        );
        assert_eq!((plan.valid_steps, plan.candidates), (12, 13));
    }
}
