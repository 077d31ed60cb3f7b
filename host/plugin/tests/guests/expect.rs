//! What tests of misbehaving guests have in common: one way to loop, and how each failure must look.

use galerne_core::guest::GuestError;
use galerne_plugin::PluginHost;

use super::Chat;

/// A body that never ends.
pub(crate) const FOREVER: &str = "(loop $again (br $again)) unreachable";

/// Another guest on the same host still works.
pub(crate) fn serves(host: &PluginHost) {
    let good = host
        .load_chat("good", &Chat::default().component())
        .expect("it fits");
    assert_eq!(good.recognises(None, &[]), Ok(true));
}

/// The guest "evil" ran past this limit in this call.
pub(crate) fn is_deadline(error: &GuestError, call: &str, limit_ms: u64) {
    match error {
        GuestError::Deadline {
            guest,
            call: got,
            limit_ms: limit,
            ..
        } => {
            assert_eq!((guest.as_str(), &**got, *limit), ("evil", call, limit_ms));
        }
        other => panic!("expected a deadline, got {other:?}"),
    }
}

/// A trap whose reason has these words.
pub(crate) fn is_trap(error: &GuestError, words: &str) {
    match error {
        GuestError::Trap { reason, .. } => {
            assert!(reason.contains(words), "expected \"{words}\" in \"{reason}\"");
        }
        other => panic!("expected a trap, got {other:?}"),
    }
}

/// A limit with these words.
pub(crate) fn is_limit(error: &GuestError, words: &str) {
    match error {
        GuestError::Limit { limit, .. } => {
            assert!(limit.contains(words), "expected \"{words}\" in \"{limit}\"");
        }
        other => panic!("expected a limit, got {other:?}"),
    }
}

/// A component that does not fit, for a reason with these words.
pub(crate) fn is_link(error: &GuestError, words: &[&str]) {
    match error {
        GuestError::Link { reason, .. } => {
            for word in words {
                assert!(reason.contains(word), "expected \"{word}\" in \"{reason}\"");
            }
        }
        other => panic!("expected a link error, got {other:?}"),
    }
}
