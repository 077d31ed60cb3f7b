//! The one question a session may have open, and its answer until it is taken. Knows no guest.

use galerne_core::guest::{Answer, GuestError};

use crate::instance::GuestCore;

/// A session's question to its guest. `A` is what the guest answers.
#[derive(Debug)]
pub(crate) struct Question<A> {
    /// It waits or is being answered.
    open: bool,
    /// The answer to the last one, until it is taken.
    answer: Option<Result<A, GuestError>>,
    /// The first failure; it answers all later ones.
    failed: Option<GuestError>,
}

impl<A> Default for Question<A> {
    fn default() -> Self {
        Self {
            open: false,
            answer: None,
            failed: None,
        }
    }
}

impl<A> Question<A> {
    /// Asks. Whether somebody has to [`answer`](Self::answer).
    pub(crate) fn ask(&mut self, core: &GuestCore, call: &'static str) -> bool {
        if self.open {
            // The first question's answer stands; the engine sees its own mistake in the log.
            core.host_bug(call, "a second question while one is open");
            return false;
        }
        self.answer = self.failed.clone().map(Err);
        self.open = self.failed.is_none();
        self.open
    }

    /// Answers what is open. A failure stays.
    pub(crate) fn answer(&mut self, answer: Result<A, GuestError>) {
        self.failed = answer.as_ref().err().cloned();
        self.answer = Some(answer);
        self.open = false;
    }

    /// Answers what is open with an error that the next question need not have.
    pub(crate) fn refuse(&mut self, error: GuestError) {
        self.answer = Some(Err(error));
        self.open = false;
    }

    /// The answer, if it is there, as `pick` sees it.
    pub(crate) fn take<T>(
        &mut self,
        core: &GuestCore,
        call: &'static str,
        pick: impl FnOnce(A) -> Option<T>,
    ) -> Answer<T> {
        if self.open {
            return Answer::Pending;
        }
        Answer::Ready(match self.answer.take() {
            Some(Ok(answer)) => {
                pick(answer).ok_or_else(|| core.host_bug(call, "took another question's answer"))
            }
            Some(Err(error)) => Err(error),
            None => Err(core.host_bug(call, "took an answer without a question")),
        })
    }
}
