//! What a cell's guests ask of the host, answered on the host's side: by whom, and how many at once. Believes nothing a cell
//! says of who asks.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use galerne_core::capability::{CapabilityError, CapabilitySession, Reply};

use super::protocol::{QUESTIONS_MAX, Question, SessionId};

/// Who answers one guest's questions in one request. A tool's goes from call to call: it counts what the request uses.
pub(super) type Answerer = Arc<Mutex<Box<dyn CapabilitySession>>>;

/// The questions of one process.
pub(super) struct Questions {
    /// The longest that one may wait for its answer.
    wait_max: Duration,
    // A std Mutex: held for look-ups, never while a question is answered.
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    answerers: HashMap<SessionId, Answerer>,
    open: usize,
    last: Option<Instant>,
}

impl Questions {
    pub(super) fn new(wait_max: Duration) -> Self {
        Self {
            wait_max,
            state: Mutex::default(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Who answers this session from now on.
    pub(super) fn expect(&self, session: SessionId, answerer: Answerer) {
        self.state().answerers.insert(session, answerer);
    }

    /// The session is over.
    pub(super) fn forget(&self, session: SessionId) {
        // Dropped without the lock: what it drops is not of this crate.
        let forgotten = self.state().answerers.remove(&session);
        drop(forgotten);
    }

    /// Counts a question that came; it is to be answered, and then [`closed`](Self::closed).
    ///
    /// # Errors
    /// There are more than a cell has threads to ask on.
    pub(super) fn opened(&self) -> Result<(), String> {
        let mut state = self.state();
        if state.open >= QUESTIONS_MAX {
            return Err(format!("it asks more than {QUESTIONS_MAX} questions at once"));
        }
        state.open += 1;
        Ok(())
    }

    /// Just before the answer is sent: the cell may ask again as soon as it has it.
    pub(super) fn closed(&self) {
        let mut state = self.state();
        state.open -= 1;
        state.last = Some(Instant::now());
    }

    /// How long ago the host owed the cell an answer, if it ever did.
    pub(super) fn owed_before(&self) -> Option<Duration> {
        let state = self.state();
        if state.open > 0 {
            return Some(Duration::ZERO);
        }
        state.last.map(|last| last.elapsed())
    }

    /// Does what is asked, or says why not. Blocks.
    pub(super) fn answer(&self, question: Question) -> Result<Reply, CapabilityError> {
        let answerer = self.state().answerers.get(&question.session).cloned();
        let Some(answerer) = answerer else {
            let reason = "capabilities can be used while a request is served, if they are granted";
            return Err(CapabilityError::Denied(reason.to_owned()));
        };
        // A guest waits for its answer, so that only a cell that lies asks again before it has it.
        let mut answerer = match answerer.try_lock() {
            Ok(answerer) => answerer,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => {
                let reason = "another question of this request is being answered";
                return Err(CapabilityError::Denied(reason.to_owned()));
            }
        };
        let time_left = question.time_left.min(self.wait_max);
        catch_unwind(AssertUnwindSafe(|| answerer.ask(question.ask, time_left))).unwrap_or_else(|_| {
            tracing::error!("bug of the host: the answer to a guest's question panicked");
            Err(CapabilityError::Failed("bug of the host".to_owned()))
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use galerne_core::capability::{
        Ask, Capabilities as _, Grants, HttpRequest, LogLevel, SecretName, SecretSource,
    };
    use galerne_core::filter::RequestInfo;
    use galerne_core::limits::Allowance;

    use super::*;
    use crate::capability::kv::MemoryKv;
    use crate::capability::log::GuestLog;
    use crate::capability::service::{CapabilityParts, HostCapabilities};
    use crate::http::{HttpClient, SystemLookup};

    /// Says that it was asked, and how long it may take; answers when it is let.
    struct Slow {
        asked: mpsc::Sender<Duration>,
        go_on: mpsc::Receiver<()>,
    }

    impl CapabilitySession for Slow {
        fn ask(&mut self, _: Ask, time_left: Duration) -> Result<Reply, CapabilityError> {
            self.asked.send(time_left).expect("the test listens");
            self.go_on.recv().expect("the test lets it go on");
            Ok(Reply::Done)
        }
    }

    struct Secrets;

    impl SecretSource for Secrets {
        fn secret(&self, _: &SecretName) -> Result<String, CapabilityError> {
            Ok("hunter2".to_owned())
        }
    }

    fn question(session: u64) -> Question {
        question_of(session, Ask::KvGet("a".to_owned()))
    }

    fn question_of(session: u64, ask: Ask) -> Question {
        Question {
            id: 0,
            session: SessionId(session),
            ask,
            time_left: Duration::MAX,
        }
    }

    fn slow() -> (Answerer, mpsc::Receiver<Duration>, mpsc::Sender<()>) {
        let ((asked, is_asked), (let_go, go_on)) = (mpsc::channel(), mpsc::channel());
        (
            Arc::new(Mutex::new(Box::new(Slow { asked, go_on }))),
            is_asked,
            let_go,
        )
    }

    fn is_denied(result: &Result<Reply, CapabilityError>, words: &str) {
        match result {
            Err(CapabilityError::Denied(reason)) => assert!(reason.contains(words), "{reason}"),
            other => panic!("expected a denial, got {other:?}"),
        }
    }

    #[test]
    fn sessions_that_are_not_or_no_longer_there_are_denied() {
        let questions = Questions::new(Duration::from_secs(3));
        is_denied(&questions.answer(question(1)), "while a request is served");
        let (answerer, is_asked, let_go) = slow();
        questions.expect(SessionId(1), answerer);
        let_go.send(()).expect("it will be asked");
        assert_eq!(questions.answer(question(1)), Ok(Reply::Done));
        assert_eq!(
            is_asked.recv(),
            Ok(Duration::from_secs(3)),
            "no longer than it may"
        );
        is_denied(&questions.answer(question(2)), "while a request is served");
        questions.forget(SessionId(1));
        is_denied(&questions.answer(question(1)), "while a request is served");
    }

    #[test]
    fn what_is_not_granted_is_denied_to_a_cell_that_asks_all_the_same() {
        let allowance = Allowance::default();
        let capabilities = HostCapabilities::new(CapabilityParts {
            tenant: "acme".to_owned(),
            deployment: "support".to_owned(),
            grants: Grants::default(),
            log: Arc::new(GuestLog::new(&allowance.limits.capability)),
            allowance,
            http: Arc::new(HttpClient::new(Arc::new(SystemLookup), vec![])),
            kv: Arc::new(MemoryKv::default()),
            secrets: Arc::new(Secrets),
        });
        let info = RequestInfo {
            id: "chatcmpl-1".to_owned(),
            model: "smollm2".to_owned(),
        };
        let questions = Questions::new(Duration::from_secs(3));
        let answerer = Arc::new(Mutex::new(capabilities.session("evil", &info)));
        questions.expect(SessionId(1), answerer);
        let text = || "a".to_owned();
        let asks = [
            Ask::Log {
                level: LogLevel::Info,
                message: text(),
            },
            Ask::Http(HttpRequest {
                method: "GET".to_owned(),
                url: "https://a.example/".to_owned(),
                headers: vec![],
                body: vec![],
            }),
            Ask::KvGet(text()),
            Ask::KvSet {
                key: text(),
                value: vec![],
            },
            Ask::KvDelete(text()),
            Ask::KvList {
                prefix: text(),
                after: text(),
            },
            Ask::Secret(text()),
        ];
        for ask in asks {
            is_denied(&questions.answer(question_of(1, ask)), "to grant it, write");
        }
    }

    #[test]
    fn a_second_question_of_a_session_does_not_wait_for_the_first() {
        let questions = Questions::new(Duration::from_secs(3));
        let (answerer, is_asked, let_go) = slow();
        questions.expect(SessionId(1), answerer);
        std::thread::scope(|scope| {
            let first = scope.spawn(|| questions.answer(question(1)));
            is_asked.recv().expect("the first is being answered");
            is_denied(&questions.answer(question(1)), "another question");
            let_go.send(()).expect("it waits");
            assert_eq!(first.join().expect("no panic"), Ok(Reply::Done));
        });
    }

    #[test]
    fn as_many_questions_are_open_as_a_cell_has_threads() {
        let questions = Questions::new(Duration::from_secs(3));
        assert_eq!(questions.owed_before(), None);
        for _ in 0..QUESTIONS_MAX {
            questions.opened().expect("a thread may ask");
        }
        questions.opened().expect_err("one thread asks twice");
        assert_eq!(questions.owed_before(), Some(Duration::ZERO));
        questions.closed();
        questions.opened().expect("it has its answer");
    }
}
