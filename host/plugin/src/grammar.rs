//! Grammars of one model: compiles what an answer must match. The only place, with the files below it, that knows
//! `llguidance`. Knows no logits and no guest.

pub(crate) mod desk;
mod place;
mod session;
mod source;

use std::fmt;
use std::sync::Arc;

use galerne_core::grammar::{
    GrammarError, GrammarFactory, GrammarSession, GrammarSource, HeldGrammar, Next, TokenText, TokenTexts,
};
use galerne_core::guest::Waker;
use galerne_core::limits::{Allowance, GrammarLimits};
use llguidance::api::{GrammarInit, ParserLimits};
use llguidance::toktrie::{
    ApproximateTokEnv, INVALID_TOKEN, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie,
};
use llguidance::{Logger, Matcher, ParserFactory};

use crate::errors::bounded;
use crate::host::HostShared;
use place::{Held, Place};
use session::Session;

/// The library's compiler calls itself for each rule or reference on the way to another, and a stack that overflows ends the
/// host. A level takes at least 8 bytes of source and has been seen to take up to 11 KB of stack. Only what is used of a
/// stack is memory.
const STACK_BYTES_PER_SOURCE_BYTE: usize = 2_048;
/// For the parts that do not depend on the source.
const STACK_BYTES_MIN: usize = 4 << 20;

/// Makes grammars over one model's vocabulary. Masks are computed on the plugin host's threads.
pub struct Grammars {
    host: Arc<HostShared>,
    factory: ParserFactory,
    vocabulary: u32,
}

impl fmt::Debug for Grammars {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grammars")
            .field("vocabulary", &self.vocabulary)
            .finish_non_exhaustive()
    }
}

impl Grammars {
    pub(crate) fn new(host: Arc<HostShared>, texts: &TokenTexts) -> Result<Self, GrammarError> {
        let vocabulary = u32::try_from(texts.tokens.len()).unwrap_or(u32::MAX);
        let factory = ParserFactory::new_simple(&environment(texts, vocabulary))
            .map_err(|error| host_error(&bounded(&format!("prepare the vocabulary: {error:#}"))))?;
        Ok(Self {
            host,
            factory,
            vocabulary,
        })
    }
}

impl GrammarFactory for Grammars {
    fn session(&self, source: &GrammarSource, waker: Waker) -> Result<Box<dyn GrammarSession>, GrammarError> {
        let states_max = self.host.options.grammar_limits.lexer_states_max;
        let (place, first) = self.place(source, states_max)?;
        let session = Session::new(Arc::clone(&self.host), place, Some(first), waker);
        Ok(Box::new(session))
    }

    fn hold(&self, source: &GrammarSource) -> Result<Arc<dyn HeldGrammar>, GrammarError> {
        let limits = &self.host.options.grammar_limits;
        let share = limits.lexer_states_max / (limits.compiled_max as usize).max(1);
        let (place, _) = self.place(source, share)?;
        Ok(Arc::new(Held {
            host: Arc::clone(&self.host),
            place,
        }))
    }
}

impl Grammars {
    /// A grammar at its beginning, with a lexer of at most so many states, and what may follow there.
    fn place(&self, source: &GrammarSource, states_max: usize) -> Result<(Arc<Place>, Next), GrammarError> {
        let limits = &self.host.options.grammar_limits;
        source::check_size(source, &Allowance::of_host(self.host.options.host_limits()))?;
        let stack_bytes = limits
            .source_bytes_max
            .saturating_mul(STACK_BYTES_PER_SOURCE_BYTE);
        on_stack(stack_bytes.max(STACK_BYTES_MIN), || {
            self.compile(source, states_max)
        })
    }

    fn compile(&self, source: &GrammarSource, states_max: usize) -> Result<(Arc<Place>, Next), GrammarError> {
        let refused = |reason: String| GrammarError::Source {
            kind: source.kind(),
            reason,
        };
        let parser = self.factory.create_parser_from_init_ext(
            GrammarInit::Serialized(source::top_level(source)),
            Logger::new(0, 0),
            InferenceCapabilities::default(),
            ParserLimits {
                max_lexer_states: states_max,
                ..parser_limits(&self.host.options.grammar_limits)
            },
        );
        let parser = parser.map_err(|error| refused(reason(&format!("{error:#}"))))?;
        let place = Place::new(Matcher::new(Ok(parser)), self.vocabulary);
        // Found here, a grammar without a text is the request's fault and not the answer's end.
        let first = place.next().map_err(|error| match error {
            GrammarError::Stuck { .. } => refused("no text matches it".to_owned()),
            other => other,
        })?;
        Ok((Arc::new(place), first))
    }
}

/// Works on a thread with a stack of its own, and waits for it.
fn on_stack<T: Send>(
    stack_bytes: usize,
    work: impl FnOnce() -> Result<T, GrammarError> + Send,
) -> Result<T, GrammarError> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("grammar".to_owned())
            .stack_size(stack_bytes);
        let working = thread.spawn_scoped(scope, work);
        let working = working.map_err(|error| host_error(&format!("start a thread: {error}")))?;
        working
            .join()
            .unwrap_or_else(|_| Err(host_error("a panic at work, see standard error")))
    })
}

fn host_error(reason: &str) -> GrammarError {
    GrammarError::Host {
        reason: reason.to_owned(),
    }
}

/// Every token as bytes in a tree. Control tokens are there under a byte no text has, so that a Lark grammar can name
/// them and nothing else matches them.
fn environment(texts: &TokenTexts, vocabulary: u32) -> TokEnv {
    let bytes = |token: &TokenText| match token {
        TokenText::Bytes(bytes) => bytes.clone(),
        TokenText::Control(name) => [&[TokTrie::SPECIAL_TOKEN_MARKER], name.as_bytes()].concat(),
    };
    let words: Vec<Vec<u8>> = texts.tokens.iter().map(bytes).collect();
    let trie = TokTrie::from(&TokRxInfo::new(vocabulary, INVALID_TOKEN), &words);
    let ends: Vec<u32> = texts.ends.iter().map(|token| token.0).collect();
    // How text becomes tokens is not known here. It would be needed to force tokens, and nothing is forced: where a
    // grammar leaves one text, the model still says in which tokens.
    Arc::new(ApproximateTokEnv::new(if ends.is_empty() {
        trie
    } else {
        trie.with_eos_tokens(&ends)
    }))
}

fn parser_limits(limits: &GrammarLimits) -> ParserLimits {
    ParserLimits {
        max_items_in_row: limits.items_max,
        initial_lexer_fuel: limits.start_fuel,
        step_lexer_fuel: limits.step_fuel,
        step_max_items: limits.step_items_max,
        max_lexer_states: limits.lexer_states_max,
        max_grammar_size: limits.symbols_max,
        precompute_large_lexemes: true,
        verbose_errors: false,
    }
}

/// An error of the library as one line, without the marks it puts where details would be.
fn reason(error: &str) -> String {
    let error = error.split("\n<").next().unwrap_or(error);
    bounded(&error.split_whitespace().collect::<Vec<_>>().join(" "))
}
