//! Samplers that keep their sequences to grammars: what they name holds with every token, and what they do wrong ends their own
//! request, in bounded time and with words.

mod guests;
#[expect(dead_code, reason = "written for the tests of grammars, which use all of it")]
#[path = "grammar/support.rs"]
mod support;

use std::sync::Arc;
use std::time::{Duration, Instant};

use galerne_core::grammar::{GrammarError, GrammarFactory, GrammarSession, Next, TokenMask};
use galerne_core::guest::{GuestError, SamplerFactory, SamplerSession, SequenceInfo};
use galerne_core::ids::TokenId;
use guests::capability::Deployment;
use guests::expect::{is_deadline, is_link};
use guests::{built, counting_waker, wait};
use serde_json::{Value, json};
use support::{END, spell, texts, vocabulary};

/// A guest whose deployment grants grammars.
struct Keeper {
    guest: Arc<dyn SamplerFactory>,
    grammars: Arc<dyn GrammarFactory>,
}

impl Keeper {
    /// If the guest is built.
    fn new(name: &str) -> Option<Self> {
        let deployment = Deployment {
            grants: r#"{"grammar": true}"#.to_owned(),
            ..Deployment::default()
        };
        let (host, _) = deployment.host();
        Some(Self {
            guest: host.load_sampler("evil", &built(name)?).expect("it fits"),
            grammars: Arc::new(host.grammars(&texts()).expect("a sound vocabulary")),
        })
    }

    fn session(&self, params: &Value) -> Result<Box<dyn SamplerSession>, GuestError> {
        self.session_of(params, false)
    }

    fn session_of(&self, params: &Value, constrained: bool) -> Result<Box<dyn SamplerSession>, GuestError> {
        let params_json = params.to_string();
        let info = SequenceInfo {
            grammars: Some(&self.grammars),
            constrained,
            ..SequenceInfo::new(&params_json, vocabulary(), 0)
        };
        self.guest.session(&info, counting_waker().0)
    }

    /// Why a session is refused.
    fn refusal(&self, params: &Value) -> String {
        let begin = Instant::now();
        let error = self.session(params).err().expect("it misbehaves");
        assert!(begin.elapsed() < Duration::from_secs(20), "{:?}", begin.elapsed());
        match error {
            GuestError::Refused { message, .. } => message,
            other => panic!("expected a refusal, got {other}"),
        }
    }

    /// The text of at most so many tokens, and whether it came to its end.
    fn text(&self, params: &Value, seed: usize, tokens_max: usize) -> Result<(String, bool), Failure> {
        let mut session = self.session(params)?;
        answer(&mut *session, seed, tokens_max)
    }
}

#[derive(Debug)]
enum Failure {
    Guest(GuestError),
    Grammar(GrammarError),
}

impl From<GuestError> for Failure {
    fn from(error: GuestError) -> Self {
        Self::Guest(error)
    }
}

/// Draws as the engine does: asks for plans when one is due, tells a plan's grammar what was drawn while it is valid, and
/// takes an allowed token.
fn answer(
    session: &mut dyn SamplerSession,
    seed: usize,
    tokens_max: usize,
) -> Result<(String, bool), Failure> {
    let (mut tokens, mut told) = (Vec::new(), 0);
    while tokens.len() < tokens_max {
        let position = u32::try_from(tokens.len()).expect("few tokens");
        session.request_plan(galerne_core::guest::PlanStep {
            position,
            accepted: tokens[told..].to_vec(),
        });
        session.flush();
        told = tokens.len();
        let plan = wait(|| session.take_plan())?;
        let mut grammar = session.take_grammar().expect("this guest's plans name a grammar");
        let mut heard = told;
        while tokens.len() < tokens_max {
            let next = next(&mut *grammar, &tokens[heard..])?;
            heard = tokens.len();
            let forced = plan.forced.get(tokens.len() - told).copied();
            let token = match (forced, next) {
                (Some(forced), _) => forced,
                (None, Next::End) => return Ok((spell(&tokens), true)),
                (None, Next::Tokens(mask)) => pick(&mask, seed + 31 * tokens.len()),
            };
            if token == END {
                return Ok((spell(&tokens), true));
            }
            tokens.push(token);
            if plan.valid_steps as usize == tokens.len() - told {
                break;
            }
        }
    }
    Ok((spell(&tokens), false))
}

fn next(grammar: &mut dyn GrammarSession, accepted: &[TokenId]) -> Result<Next, Failure> {
    grammar.request_next(accepted.to_vec());
    let patience = Instant::now() + Duration::from_secs(10);
    loop {
        match grammar.take_next() {
            galerne_core::guest::Answer::Ready(next) => return next.map_err(Failure::Grammar),
            galerne_core::guest::Answer::Pending => assert!(Instant::now() < patience, "no mask in 10 s"),
        }
        std::thread::yield_now();
    }
}

fn pick(mask: &TokenMask, random: usize) -> TokenId {
    let allowed: Vec<TokenId> = (0..vocabulary())
        .map(TokenId)
        .filter(|t| mask.allows(*t))
        .collect();
    // The high bits depend on all of the number.
    allowed[(random.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) % allowed.len()]
}

fn evil(misbehave: &str) -> Value {
    json!({"misbehave": misbehave})
}

#[test]
fn one_of_the_choices_is_answered_and_each_may_be() {
    let Some(keeper) = Keeper::new("choices") else {
        return;
    };
    let mut choices = vec!["yes", "no", "no way", "né \"日本\"", "a\\b\n"];
    let params = json!({"choices": choices});
    let mut answered = std::collections::BTreeSet::new();
    for seed in 0..120 {
        let (text, ended) = keeper.text(&params, seed, 50).expect("an answer");
        assert!(ended && choices.contains(&text.as_str()), "{text:?}");
        answered.insert(text);
    }
    choices.sort_unstable();
    assert_eq!(answered.into_iter().collect::<Vec<_>>(), choices);
}

#[test]
fn what_makes_no_sense_is_refused_in_the_guests_words() {
    let Some(keeper) = Keeper::new("choices") else {
        return;
    };
    let said = keeper.refusal(&json!({"choices": "yes"}));
    assert!(said.contains("params.choices: expected an array"), "{said}");
    let params = json!({"choices": ["yes"]});
    match keeper.session_of(&params, true).err() {
        Some(GuestError::Refused { message, .. }) => {
            assert!(message.contains("response_format"), "{message}");
        }
        other => panic!("expected a refusal, got {other:?}"),
    }
}

#[test]
fn without_a_grant_the_guest_is_not_loaded() {
    let Some(component) = built("choices") else { return };
    let (host, _) = Deployment::default().host();
    let error = host.load_sampler("evil", &component).err().expect("not granted");
    is_link(&error, &["galerne:grammar/grammars@0.1.0", "grammar = true"]);
}

#[test]
fn a_grammar_that_every_plan_names_goes_on_where_it_is() {
    let Some(keeper) = Keeper::new("hostile-sampler") else {
        return;
    };
    for seed in 0..20 {
        let params = json!({"misbehave": "", "regex": "(yes|no) abc{2,4}(na(me)?)*!", "valid": seed % 5});
        let (text, ended) = keeper.text(&params, seed, 80).expect("an answer");
        let rest = text.strip_prefix("yes ab").or_else(|| text.strip_prefix("no ab"));
        let rest = rest.unwrap_or_else(|| panic!("{text:?}"));
        let names = rest.trim_start_matches('c');
        assert!((2..=4).contains(&(rest.len() - names.len())), "{text:?}");
        if ended {
            let names = names.strip_suffix('!').unwrap_or_else(|| panic!("{text:?}"));
            assert_eq!(names.replace("name", "").replace("na", ""), "", "{text:?}");
        }
    }
}

#[test]
fn a_guest_that_moves_its_grammar_moves_what_it_is_kept_to() {
    let Some(keeper) = Keeper::new("hostile-sampler") else {
        return;
    };
    // Each plan takes three more, then one is drawn, until the grammar has ten.
    let ahead = json!({"misbehave": "ahead", "regex": "a{10}"});
    assert_eq!(
        keeper.text(&ahead, 0, 50).expect("an answer"),
        ("aa".to_owned(), true)
    );
    // Each plan takes back what was drawn: the grammar never gets on.
    let behind = json!({"misbehave": "behind", "regex": "a{3}"});
    assert_eq!(
        keeper.text(&behind, 0, 9).expect("an answer"),
        ("a".repeat(9), false)
    );
}

#[test]
fn a_plan_that_names_what_the_guest_does_not_hold() {
    let Some(keeper) = Keeper::new("hostile-sampler") else {
        return;
    };
    for (misbehave, got) in [("stale", "got 0"), ("unknown", "got 4000")] {
        let error = keeper.text(&evil(misbehave), 0, 9).expect_err("it misbehaves");
        let Failure::Guest(error @ GuestError::Plan { .. }) = error else {
            panic!("expected a plan error, got {error:?}")
        };
        let said = error.to_string();
        assert!(
            said.contains("grammar must be the id of a grammar that the session holds") && said.contains(got),
            "{said}"
        );
    }
}

#[test]
fn grammars_too_large_too_many_and_too_late() {
    let Some(keeper) = Keeper::new("hostile-sampler") else {
        return;
    };
    for (params, words) in [
        (
            json!({"misbehave": "bomb", "source": "(ab|c)", "times": 30_000}),
            "at most 131072 bytes (grammar_source_bytes_max, the host's operator can raise it), got 180000",
        ),
        (
            json!({"misbehave": "nested", "times": 1_000}),
            "at most 128 nested brackets (grammar_nesting_max, the host's operator can raise it), got 1000",
        ),
        (
            evil("compile"),
            "at most 8 are compiled for one sequence (grammar_compiled_max, the host's operator can raise it)",
        ),
        (
            evil("fork"),
            "at most 16 of one sequence at once (grammar_held_max, the host's operator can raise it)",
        ),
        (evil("leak"), "at most 16 of one sequence at once"),
        (
            evil("rollback"),
            "expected at most as many tokens as it took, got 1",
        ),
        (
            json!({"misbehave": "accept", "times": 65}),
            "at most 64 tokens in one call (grammar_tokens_max, the host's operator can raise it), got 65",
        ),
    ] {
        let said = keeper.refusal(&params);
        assert!(said.contains(words), "{params}: {said}");
    }
    let late = keeper.text(&evil("late"), 0, 9).expect_err("it misbehaves");
    assert!(
        matches!(late, Failure::Guest(GuestError::Trap { .. })),
        "{late:?}"
    );
    let fine = keeper.text(&json!({"misbehave": "accept", "times": 64}), 0, 9);
    fine.expect("a neighbour is served");
}

#[test]
fn grammars_that_are_work_are_refused_or_stopped_soon() {
    let Some(keeper) = Keeper::new("hostile-sampler") else {
        return;
    };
    for regex in [
        "(((a{1,100}){1,100}){1,100}){1,100}",
        "(a|b)*a(a|b){25}",
        "([a-z]{1,500}[0-9]{1,500}){500}",
    ] {
        let begin = Instant::now();
        let params = json!({"misbehave": "", "regex": regex});
        match keeper.text(&params, 3, 40) {
            Ok(_)
            | Err(Failure::Guest(GuestError::Refused { .. } | GuestError::Deadline { .. }))
            | Err(Failure::Grammar(GrammarError::TooComplex { .. })) => {}
            Err(other) => panic!("{regex}: {other:?}"),
        }
        assert!(
            begin.elapsed() < Duration::from_secs(30),
            "{regex}: {:?}",
            begin.elapsed()
        );
    }
}

#[test]
fn questions_without_end_meet_the_deadline_and_others_go_on() {
    let Some(keeper) = Keeper::new("hostile-sampler") else {
        return;
    };
    let mut spinning = keeper.session(&evil("spin")).expect("a session");
    spinning.request_plan(galerne_core::guest::PlanStep {
        position: 0,
        accepted: Vec::new(),
    });
    spinning.flush();
    keeper.text(&evil(""), 0, 9).expect("a neighbour is served");
    let error = wait(|| spinning.take_plan()).expect_err("it never ends");
    is_deadline(&error, "plan", 200);
}

#[test]
fn a_forced_token_that_the_grammar_does_not_allow() {
    let Some(keeper) = Keeper::new("hostile-sampler") else {
        return;
    };
    let error = keeper.text(&evil("forced"), 0, 9).expect_err("it misbehaves");
    assert!(
        matches!(error, Failure::Grammar(GrammarError::Stuck { .. })),
        "{error:?}"
    );
}

#[test]
fn many_sequences_ask_at_once() {
    let Some(keeper) = Keeper::new("hostile-sampler") else {
        return;
    };
    std::thread::scope(|scope| {
        for seed in 0..8 {
            let keeper = &keeper;
            scope.spawn(move || {
                for misbehave in ["", "ahead", "behind"] {
                    keeper.text(&evil(misbehave), seed, 20).expect("an answer");
                }
            });
        }
    });
}
