//! The grammars that one sampling session holds: answers what its guest asks of them, and finds the one that a plan names.
//! Knows no guest runtime and no parser.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use galerne_core::capability::{Ask, CapabilityError, CapabilitySession, Reply};
use galerne_core::grammar::{
    GrammarAsk, GrammarError, GrammarFactory, GrammarId, GrammarReply, GrammarSession, GrammarText,
    HeldGrammar, Next,
};
use galerne_core::guest::{Answer, Waker};
use galerne_core::ids::TokenId;
use galerne_core::limits::Allowance;
use galerne_core::sampling::PlanError;

use super::source::check_size;

/// One session's grammars.
pub(crate) struct Desk {
    factory: Arc<dyn GrammarFactory>,
    allowance: Arc<Allowance>,
    waker: Waker,
    // A std Mutex: held for look-ups, never while a grammar works.
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    held: HashMap<GrammarId, Arc<dyn HeldGrammar>>,
    /// Grammars so far; the next one's number.
    made: u32,
    compiled: u32,
    /// Whether a plan was asked for.
    begun: bool,
    /// What the last plan named.
    named: Option<Named>,
}

struct Named {
    grammar: Arc<dyn HeldGrammar>,
    /// Of the tokens drawn by that plan, how many it knows of.
    told: Arc<AtomicUsize>,
}

impl Desk {
    /// `waker` is called when a mask is there.
    pub(crate) fn new(
        factory: Arc<dyn GrammarFactory>,
        allowance: Arc<Allowance>,
        waker: Waker,
    ) -> Arc<Self> {
        Arc::new(Self {
            factory,
            allowance,
            waker,
            state: Mutex::default(),
        })
    }

    /// Who answers the guest.
    pub(crate) fn asked(self: &Arc<Self>) -> Box<dyn CapabilitySession> {
        Box::new(Asked(Arc::clone(self)))
    }

    /// Before a plan is asked for: the last one is over, and drew these tokens.
    pub(crate) fn drawn(&self, accepted: &[TokenId]) {
        let mut state = self.state();
        state.begun = true;
        let named = state.named.take();
        drop(state);
        if let Some(Named { grammar, told }) = named {
            let told = told.load(Ordering::Relaxed);
            grammar.drawn(accepted.get(told..).unwrap_or_default());
        }
    }

    /// The grammar that a plan names, asked already what may come next.
    ///
    /// # Errors
    /// The guest holds none of this number.
    pub(crate) fn named(&self, id: GrammarId) -> Result<Box<dyn GrammarSession>, PlanError> {
        let grammar = self.held(id).ok_or_else(|| not_held(id))?;
        let mut session = grammar.session(Arc::clone(&self.waker));
        session.request_next(Vec::new());
        let told = Arc::new(AtomicUsize::new(0));
        self.state().named = Some(Named {
            grammar,
            told: Arc::clone(&told),
        });
        Ok(Box::new(Telling { session, told }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing can panic between two changes.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn held(&self, id: GrammarId) -> Option<Arc<dyn HeldGrammar>> {
        self.state().held.get(&id).cloned()
    }

    fn answer(&self, ask: GrammarAsk) -> Result<GrammarReply, CapabilityError> {
        let find = |id| self.held(id).ok_or_else(unknown);
        match ask {
            GrammarAsk::Compile(text) => self.compile(text),
            GrammarAsk::Fork(id) => {
                let grammar = find(id)?;
                self.check_room()?;
                self.keep(grammar.fork().map_err(|error| failed(&error))?)
            }
            GrammarAsk::Accept(id, tokens) => {
                let max = self.allowance.limits.grammar.accepted_tokens_max;
                if tokens.len() > max {
                    return Err(CapabilityError::Limit(format!(
                        "grammar: accept: expected at most {max} tokens in one call ({}), got {}",
                        self.allowance.who("grammar_tokens_max"),
                        tokens.len()
                    )));
                }
                let accepted = find(id)?.accept(&tokens).map_err(|error| failed(&error))?;
                Ok(GrammarReply::Accepted(
                    u32::try_from(accepted).unwrap_or(u32::MAX),
                ))
            }
            GrammarAsk::Rollback(id, tokens) => {
                let wanted = usize::try_from(tokens).unwrap_or(usize::MAX);
                if find(id)?.rollback(wanted).map_err(|error| failed(&error))? {
                    return Ok(GrammarReply::Done);
                }
                Err(CapabilityError::Invalid(format!(
                    "grammar: rollback: expected at most as many tokens as it took, got {tokens}"
                )))
            }
            GrammarAsk::Status(id) => Ok(GrammarReply::Status(
                find(id)?.status().map_err(|error| failed(&error))?,
            )),
            GrammarAsk::Drop(id) => {
                // Dropped without the lock: it may be megabytes in small pieces.
                let dropped = self.state().held.remove(&id);
                drop(dropped);
                Ok(GrammarReply::Done)
            }
        }
    }

    fn compile(&self, text: GrammarText) -> Result<GrammarReply, CapabilityError> {
        self.check_room()?;
        let max = self.allowance.limits.grammar.compiled_max;
        let mut state = self.state();
        // A compilation takes as long as many plans, and others' plans may wait for the same thread.
        if state.begun {
            return Err(CapabilityError::Invalid(
                "grammar: compile: expected a call from create, got one from plan or choose; compile there and fork here"
                    .to_owned(),
            ));
        }
        if state.compiled >= max {
            return Err(CapabilityError::Limit(format!(
                "grammar: at most {max} are compiled for one sequence ({}); fork one",
                self.allowance.who("grammar_compiled_max")
            )));
        }
        // Those that fail count too: they are work.
        state.compiled += 1;
        drop(state);
        let source = text.source().map_err(|error| failed(&error))?;
        check_size(&source, &self.allowance).map_err(|error| failed(&error))?;
        self.keep(self.factory.hold(&source).map_err(|error| failed(&error))?)
    }

    fn check_room(&self) -> Result<(), CapabilityError> {
        let max = self.allowance.limits.grammar.held_max;
        if self.state().held.len() >= max {
            return Err(CapabilityError::Limit(format!(
                "grammar: at most {max} of one sequence at once ({}); drop one",
                self.allowance.who("grammar_held_max")
            )));
        }
        Ok(())
    }

    fn keep(&self, grammar: Arc<dyn HeldGrammar>) -> Result<GrammarReply, CapabilityError> {
        let mut state = self.state();
        let id = GrammarId(state.made);
        state.made = state.made.checked_add(1).ok_or_else(unknown)?;
        state.held.insert(id, grammar);
        Ok(GrammarReply::Grammar(id))
    }
}

/// What is wrong with a plan that names a grammar nobody holds.
pub(crate) fn not_held(GrammarId(id): GrammarId) -> PlanError {
    PlanError {
        field: "grammar".into(),
        expected: "the id of a grammar that the session holds and has not dropped".into(),
        got: id.to_string(),
    }
}

/// In a process of ours no handle outlives its grammar.
fn unknown() -> CapabilityError {
    CapabilityError::Invalid("grammar: the session holds no such grammar".to_owned())
}

fn failed(error: &GrammarError) -> CapabilityError {
    let text = format!("grammar: {error}");
    match error {
        GrammarError::Source { .. } => CapabilityError::Invalid(text),
        GrammarError::TooLarge { .. } | GrammarError::TooComplex { .. } => CapabilityError::Limit(text),
        GrammarError::Stuck { .. } | GrammarError::Host { .. } => CapabilityError::Failed(text),
    }
}

/// A guest's questions to its desk.
struct Asked(Arc<Desk>);

impl CapabilitySession for Asked {
    fn ask(&mut self, ask: Ask, _: Duration) -> Result<Reply, CapabilityError> {
        match ask {
            Ask::Grammar(ask) => self.0.answer(ask).map(Reply::Grammar),
            _ => Err(CapabilityError::Denied(
                "samplers may ask for grammars only".to_owned(),
            )),
        }
    }
}

/// A grammar that a plan names: counts what the engine tells it.
struct Telling {
    session: Box<dyn GrammarSession>,
    told: Arc<AtomicUsize>,
}

impl GrammarSession for Telling {
    fn request_next(&mut self, accepted: Vec<TokenId>) {
        self.told.fetch_add(accepted.len(), Ordering::Relaxed);
        self.session.request_next(accepted);
    }

    fn take_next(&mut self) -> Answer<Next, GrammarError> {
        self.session.take_next()
    }
}
