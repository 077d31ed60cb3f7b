//! What a guest may do outside itself, as plain data: what is granted, what it asks, what it is told. Performs nothing.
//!
//! A guest's question is an [`Ask`] and its answer a [`Reply`], both plain data, so that a guest in another process asks
//! the same [`CapabilitySession`] over a wire.

mod http_grant;
mod log;

use std::collections::BTreeSet;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::filter::RequestInfo;
use crate::grammar::{GrammarAsk, GrammarReply};
use crate::limits::Allowance;
use crate::pipeline::{PipelineAsk, PipelineReply};
pub use http_grant::{HttpGrant, HttpGrantError, Scheme};
pub use log::{LogLevel, LogLine, LogTail};

/// What a deployment lets its guests do: its table `[capabilities]`. By default nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Grants {
    /// Write to the deployment's log.
    pub log: bool,
    /// Call these hosts over HTTP.
    pub http: Vec<HttpGrant>,
    /// Keep values in the tenant's key-value store.
    pub kv: bool,
    /// Read these secrets of the tenant.
    pub secrets: BTreeSet<SecretName>,
    /// Keep what a sampler draws to grammars.
    pub grammar: bool,
}

/// The name of a secret: 1 to 64 of letters, digits and `_`. Safe as a file's name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SecretName(String);

/// No name of a secret.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("secret name {0:?}: expected 1 to 64 of letters, digits and \"_\"")]
pub struct SecretNameError(String);

impl SecretName {
    /// Checks a name.
    ///
    /// # Errors
    /// It is none.
    pub fn new(name: &str) -> Result<Self, SecretNameError> {
        let fits = name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
        if fits && (1..=64).contains(&name.len()) {
            Ok(Self(name.to_owned()))
        } else {
            Err(SecretNameError(name.chars().take(64).collect()))
        }
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for SecretName {
    type Error = SecretNameError;

    fn try_from(name: String) -> Result<Self, SecretNameError> {
        Self::new(&name)
    }
}

impl From<SecretName> for String {
    fn from(name: SecretName) -> Self {
        name.0
    }
}

/// An HTTP request of a guest. Nothing of it is checked yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HttpRequest {
    /// `GET`, `POST` and the like.
    pub method: String,
    /// With scheme and host.
    pub url: String,
    /// Names and values.
    pub headers: Vec<(String, String)>,
    /// Empty for none.
    pub body: Vec<u8>,
}

/// The answer to an [`HttpRequest`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HttpResponse {
    /// From 100 to 599.
    pub status: u16,
    /// Names in lower case, and values; a value that is not text is left out.
    pub headers: Vec<(String, String)>,
    /// Bounded.
    pub body: Vec<u8>,
}

/// A guest's question to the host.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Ask {
    /// A line for the log. Answered by [`Reply::Done`].
    Log {
        /// How much it matters.
        level: LogLevel,
        /// Any text; the host escapes and cuts it.
        message: String,
    },
    /// Answered by [`Reply::Http`].
    Http(HttpRequest),
    /// The value of a key. Answered by [`Reply::Value`].
    KvGet(String),
    /// Sets a key. Answered by [`Reply::Done`].
    KvSet {
        /// What.
        key: String,
        /// To what.
        value: Vec<u8>,
    },
    /// Forgets a key, if it is there. Answered by [`Reply::Done`].
    KvDelete(String),
    /// Keys in order. Answered by [`Reply::Keys`].
    KvList {
        /// Those that begin so.
        prefix: String,
        /// Those behind this one; all, if it is empty.
        after: String,
    },
    /// The value of a secret. Answered by [`Reply::Secret`].
    Secret(String),
    /// What only a pipeline may ask. Answered by [`Reply::Pipeline`].
    Pipeline(PipelineAsk),
    /// What only a sampler may ask. Answered by [`Reply::Grammar`].
    Grammar(GrammarAsk),
}

/// The host's answer to an [`Ask`].
#[derive(Clone, PartialEq, Serialize, Deserialize)]
pub enum Reply {
    /// It is done.
    Done,
    /// What the server said.
    Http(HttpResponse),
    /// The value, if the key is there.
    Value(Option<Vec<u8>>),
    /// Some keys; more may follow behind the last.
    Keys(Vec<String>),
    /// A secret's value.
    Secret(String),
    /// Of the model.
    Pipeline(PipelineReply),
    /// Of a grammar.
    Grammar(GrammarReply),
}

/// Says which kind of reply it is and nothing of what is in it: it may be a secret.
impl std::fmt::Debug for Reply {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Done => "Done",
            Self::Http(_) => "Http(..)",
            Self::Value(_) => "Value(..)",
            Self::Keys(_) => "Keys(..)",
            Self::Secret(_) => "Secret(..)",
            Self::Pipeline(_) => "Pipeline(..)",
            Self::Grammar(_) => "Grammar(..)",
        })
    }
}

/// Why a guest's question has no answer. The texts are for the guest's author and carry no secret.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum CapabilityError {
    /// Not granted, and how to grant it; or never allowed.
    #[error("{0}")]
    Denied(String),
    /// The question makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// A limit, its value, and who can raise it.
    #[error("{0}")]
    Limit(String),
    /// It took too long.
    #[error("{0}")]
    Timeout(String),
    /// It did not work.
    #[error("{0}")]
    Failed(String),
    /// The request is over, whatever the guest does: why.
    #[error("{0}")]
    Over(String),
}

/// What the guests of one deployment may do, and who does it for them.
pub trait Capabilities: Send + Sync {
    /// What is granted. A guest that imports anything else is not loaded.
    fn grants(&self) -> &Grants;

    /// How much of it, and of everything else that is limited.
    fn allowance(&self) -> &Allowance;

    /// For one request: what is counted per request is counted here. `guest` is the guest's name.
    fn session(&self, guest: &str, info: &RequestInfo) -> Box<dyn CapabilitySession>;

    /// What its guests wrote after the line of this number, as far as it is kept.
    fn log_after(&self, number: u64) -> LogTail;
}

/// Answers the questions of one guest in one request.
pub trait CapabilitySession: Send {
    /// Does what is asked, or says why not. Blocks for at most `time_left`, but for short work on a local disk.
    ///
    /// # Errors
    /// See [`CapabilityError`]. [`CapabilityError::Over`] ends the request, and so does [`CapabilityError::Limit`] on
    /// [`Ask::Log`] and [`Ask::Pipeline`]; all others are the guest's to handle.
    fn ask(&mut self, ask: Ask, time_left: Duration) -> Result<Reply, CapabilityError>;
}

/// A tenant's key-value store. It keeps to the limits of whoever asks: what would go beyond them changes nothing.
pub trait KvStore: Send + Sync {
    /// The value of a key, if it is there.
    ///
    /// # Errors
    /// The storage failed.
    fn get(&self, key: &str) -> Result<Option<Vec<u8>>, CapabilityError>;
    /// Sets a key.
    ///
    /// # Errors
    /// Key, value or store would be too large, or the storage failed.
    fn set(&self, key: &str, value: &[u8], allowance: &Allowance) -> Result<(), CapabilityError>;
    /// Forgets a key, if it is there.
    ///
    /// # Errors
    /// The storage failed.
    fn delete(&self, key: &str) -> Result<(), CapabilityError>;
    /// Up to `listed_max` keys that begin with `prefix` and come after `after`, in the order of their bytes.
    ///
    /// # Errors
    /// The storage failed.
    fn list(&self, prefix: &str, after: &str, listed_max: usize) -> Result<Vec<String>, CapabilityError>;
}

/// A tenant's secrets.
pub trait SecretSource: Send + Sync {
    /// The value of a secret.
    ///
    /// # Errors
    /// There is none of that name, or it cannot be read. Never says anything of its value.
    fn secret(&self, name: &SecretName) -> Result<String, CapabilityError>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_granted_by_default() {
        let grants: Grants = serde_json::from_str("{}").expect("an empty table");
        assert_eq!(grants, Grants::default());
        assert!(!grants.log && !grants.kv && grants.http.is_empty() && grants.secrets.is_empty());
        assert!(!grants.grammar);
    }

    #[test]
    fn grants_are_read_and_written() {
        let text = r#"{"log":true,"http":["api.example.com","http://*.example.org:8080"],"kv":true,"secrets":["CRM_TOKEN"],"grammar":true}"#;
        let grants: Grants = serde_json::from_str(text).expect("grants");
        assert_eq!(serde_json::to_string(&grants).expect("writes"), text);
        let error = serde_json::from_str::<Grants>(r#"{"https": []}"#).expect_err("a slip");
        assert!(error.to_string().contains("https"), "{error}");
    }

    #[test]
    fn a_secret_is_no_path() {
        for bad in ["", "../token", "a/b", "a.b", "é", &"x".repeat(65)] {
            assert!(SecretName::new(bad).is_err(), "{bad}");
        }
        assert!(SecretName::new("CRM_TOKEN").is_ok());
    }

    #[test]
    fn a_reply_is_not_printed() {
        assert_eq!(format!("{:?}", Reply::Secret("hunter2".to_owned())), "Secret(..)");
    }
}
