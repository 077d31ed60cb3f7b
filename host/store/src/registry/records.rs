//! What the registry's files say, and its errors. Plain data; opens no file.

use galerne_core::deployment::Deployment;
use galerne_core::guest::World;
use serde::{Deserialize, Serialize};

/// A version of a plugin. Never changes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PluginRecord {
    /// The plugin's name.
    pub name: String,
    /// Its version, semantic.
    pub version: String,
    /// `sha256:` digest of the component.
    pub digest: String,
    /// Length of the component.
    pub size_bytes: u64,
    /// The worlds it fits.
    pub worlds: Vec<World>,
    /// The capabilities it imports.
    pub imports: Vec<String>,
    /// When it was pushed: UTC, RFC 3339.
    pub created: String,
}

/// A version of a deployment. Never changes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Published {
    /// From 1.
    pub version: u32,
    /// When it was published: UTC, RFC 3339.
    pub created: String,
    /// As given, with every guest's version and digest.
    pub deployment: Deployment,
}

/// Which versions of a deployment answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traffic {
    /// The version that answers.
    pub stable: u32,
    /// Versions that were stable before, the latest last.
    #[serde(default)]
    pub history: Vec<u32>,
    /// A version that answers a part of the requests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub canary: Option<Canary>,
}

/// A version on trial.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Canary {
    /// Which.
    pub version: u32,
    /// Its part of the requests, 1 to 99.
    pub percent: u8,
}

/// A deployment as a whole.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DeploymentRecord {
    /// Its name.
    pub name: String,
    /// Where requests go.
    #[serde(flatten)]
    pub traffic: Traffic,
    /// All versions there are.
    pub versions: Vec<u32>,
}

/// Why the registry refuses or fails.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// A file operation failed.
    #[error("{operation} {path}: {source}")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// The file or folder.
        path: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file is not what was written there.
    #[error("{path} is damaged: {problem}; restore it from a copy, or push or deploy again")]
    Damaged {
        /// The file.
        path: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A name or version that cannot be one.
    #[error("{what}: expected {expected}, got {got:?}")]
    Name {
        /// Of what.
        what: &'static str,
        /// What may stand there.
        expected: &'static str,
        /// What came.
        got: String,
    },
    /// Versions are immutable.
    #[error(
        "plugin \"{name}\" {version} exists with another component ({digest}); versions never change: push under a higher version"
    )]
    VersionTaken {
        /// The plugin.
        name: String,
        /// The version.
        version: String,
        /// What it is.
        digest: String,
    },
    /// There is no such deployment.
    #[error("no deployment \"{name}\"; there {}", listed(.known))]
    NoDeployment {
        /// The name asked for.
        name: String,
        /// Names that exist.
        known: Vec<String>,
    },
    /// There is no such version.
    #[error("deployment \"{name}\" has no version {version}; it has {known:?}")]
    NoVersion {
        /// The deployment.
        name: String,
        /// The version asked for.
        version: u32,
        /// Versions that exist.
        known: Vec<u32>,
    },
}

fn listed(names: &[String]) -> String {
    if names.is_empty() {
        "are none".to_owned()
    } else {
        format!("are: {}", names.join(", "))
    }
}
