//! One call's questions to the host: who answers, how long the call may wait, how long it has. Knows no interface.

use std::time::{Duration, Instant};

use galerne_core::capability::{Ask, CapabilityError, CapabilitySession, Reply};

/// A guest went past a limit that ends its request.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct OverLimit(pub(crate) String);

/// A store's way to the host.
#[derive(Default)]
pub(crate) struct Asking {
    session: Option<Box<dyn CapabilitySession>>,
    /// What the running call may still wait.
    left: Duration,
    /// What the running call has waited and not yet got back on its deadline.
    waited: Duration,
}

impl std::fmt::Debug for Asking {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Asking")
            .field("left", &self.left)
            .finish_non_exhaustive()
    }
}

impl Asking {
    /// Who answers from now on.
    pub(crate) fn set_session(&mut self, session: Option<Box<dyn CapabilitySession>>) {
        self.session = session;
    }

    /// Gives back who answered, with what was counted.
    pub(crate) fn take_session(&mut self) -> Option<Box<dyn CapabilitySession>> {
        self.session.take()
    }

    /// A new call begins, which may wait this long in all.
    pub(crate) fn begin(&mut self, wait_max: Duration) {
        self.left = wait_max;
        self.waited = Duration::ZERO;
    }

    /// What the running call may still wait.
    pub(crate) fn left(&self) -> Duration {
        self.left
    }

    /// What the call's deadline is to be put off by, once.
    pub(crate) fn take_waited(&mut self) -> Duration {
        std::mem::take(&mut self.waited)
    }

    /// Asks. A line for the log is taken even if there is no time to wait: it waits for nobody, but on its way out of a cell.
    pub(crate) fn ask(&mut self, ask: Ask) -> Result<Reply, CapabilityError> {
        let Some(session) = &mut self.session else {
            return Err(CapabilityError::Failed(
                "capabilities can be used while a request is served, and not before".to_owned(),
            ));
        };
        let is_line = matches!(ask, Ask::Log { .. });
        let is_work = match &ask {
            Ask::Pipeline(ask) => ask.is_work(),
            Ask::Grammar(_) => true,
            _ => false,
        };
        if self.left.is_zero() && !is_line {
            return Err(CapabilityError::Timeout(
                "this call has waited for capabilities as long as it may".to_owned(),
            ));
        }
        let started = Instant::now();
        let result = session.ask(ask, self.left);
        let took = started.elapsed();
        // A guest may write lines for ever, and must not have for ever.
        let took = if is_line { took.min(self.left) } else { took };
        if !is_work {
            self.left = self.left.saturating_sub(took);
            self.waited += took;
        }
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes a little time, or all there is.
    struct Slow;

    impl CapabilitySession for Slow {
        fn ask(&mut self, ask: Ask, time_left: Duration) -> Result<Reply, CapabilityError> {
            std::thread::sleep(match ask {
                Ask::KvGet(key) if key == "all" => time_left,
                _ => Duration::from_millis(1),
            });
            Ok(Reply::Done)
        }
    }

    #[test]
    fn waiting_ends_and_is_given_back_once() {
        // So much that a machine with other things to do does not use it up by itself.
        let wait_max = Duration::from_millis(500);
        let mut asking = Asking::default();
        asking.set_session(Some(Box::new(Slow)));
        asking.begin(wait_max);
        for key in ["a little", "all"] {
            asking.ask(Ask::KvGet(key.to_owned())).expect("time is left");
        }
        let ask = || Ask::KvGet("a little".to_owned());
        assert!(matches!(asking.ask(ask()), Err(CapabilityError::Timeout(_))));
        assert!(asking.take_waited() >= wait_max);
        assert_eq!(asking.take_waited(), Duration::ZERO);
        asking.begin(wait_max);
        asking.ask(ask()).expect("a new call waits anew");
    }

    #[test]
    fn without_a_request_there_is_no_answer() {
        let asked = Asking::default().ask(Ask::KvGet("a".to_owned()));
        assert!(matches!(asked, Err(CapabilityError::Failed(_))));
    }
}
