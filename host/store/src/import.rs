//! From a GGUF file or a Hugging Face folder to a package. Must not know which guests exist: the caller chooses them.
//!
//! A package appears whole or not at all: files are written into a hidden folder beside it, which is renamed at the
//! end and removed upon an error or a cancellation.

use galerne_core::name::{NAME_FORM, is_name};
use galerne_core::weights::WeightIndex;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use crate::gguf::GgufError;
use crate::manifest::ChatManifest;
use crate::package::{Package, PackageError};
use crate::tensor_file::TensorFileError;
use crate::tokenizer::{Tokenizer, TokenizerError};

mod gguf_config;
mod gguf_source;
mod gguf_tokenizer;
mod hf_source;
mod license;
mod plan;
mod rope_factors;
mod writer;

/// What to import, and where to.
#[derive(Debug, Clone)]
pub struct ImportRequest<'a> {
    /// A GGUF file, or a folder with `config.json`, `tokenizer.json` and safetensors.
    pub source: &'a Path,
    /// The folder with one folder for each model; created if missing.
    pub models_dir: &'a Path,
    /// The new model's name.
    pub name: &'a str,
    /// The package's version; `0.1.0` if not given.
    pub version: Option<&'a str>,
    /// SPDX licence expression; if not given, what the source states.
    pub license: Option<&'a str>,
    /// Whether a model of this name may be replaced.
    pub replace: bool,
    /// The current time, for the manifest.
    pub now: SystemTime,
}

/// Chooses the guests of a package.
pub trait GuestChooser {
    /// The architecture guest for a model type: a component.
    ///
    /// # Errors
    /// A message that says what to do, if there is none.
    fn architecture(&self, model_type: &str) -> Result<Vec<u8>, String>;

    /// The chat format guest for a template text and special tokens: a component.
    ///
    /// # Errors
    /// A message that says what to do, if there is none.
    fn chat(&self, template: Option<&str>, special_tokens: &[String]) -> Result<Vec<u8>, String>;

    /// Whether this architecture fits the configuration and the weights, before anything is written.
    ///
    /// # Errors
    /// A message that says what does not fit. Choosers that cannot run guests accept.
    fn check(&self, architecture: &[u8], config_json: &str, weights: &WeightIndex) -> Result<(), String> {
        let _ = (architecture, config_json, weights);
        Ok(())
    }
}

/// Hears how far an import is.
pub trait Progress: Sync {
    /// A new stage begins, with this many bytes to go; 0 if not known.
    fn stage(&self, name: &str, total_bytes: u64);
    /// This many more bytes of the stage are done.
    fn advance(&self, bytes: u64);
}

/// Ignores progress.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoProgress;

impl Progress for NoProgress {
    fn stage(&self, _name: &str, _total_bytes: u64) {}
    fn advance(&self, _bytes: u64) {}
}

/// Why an import failed. Nothing is left behind.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// The name cannot be a model's.
    #[error("model name {0:?}: expected {NAME_FORM}")]
    Name(String),
    /// There is a model of this name.
    #[error("model {0:?} exists; choose another name, or replace it with --replace")]
    Exists(String),
    /// The source is neither a GGUF file nor a folder with `config.json`.
    #[error("import {0}: expected a GGUF file or a folder with config.json, tokenizer.json and safetensors")]
    Source(String),
    /// Not enough space.
    #[error(
        "import into {dir}: needs {needed} bytes, {free} are free; free some space or choose another data folder"
    )]
    Space {
        /// The target folder.
        dir: String,
        /// Bytes needed.
        needed: u64,
        /// Bytes free.
        free: u64,
    },
    /// The caller cancelled.
    #[error("import cancelled; nothing was kept")]
    Cancelled,
    /// A file operation failed.
    #[error("{operation} {path}: {source}")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// The file.
        path: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// The GGUF file does not hold.
    #[error("import {path}: {source}")]
    Gguf {
        /// The file.
        path: String,
        /// What is wrong.
        source: GgufError,
    },
    /// A safetensors file does not hold.
    #[error("import {path}: {source}")]
    TensorFile {
        /// The file.
        path: String,
        /// What is wrong.
        source: TensorFileError,
    },
    /// A field of the source's configuration does not hold.
    #[error("{file}: {field}: expected {expected}, got {got}")]
    Field {
        /// The file or section.
        file: String,
        /// The field.
        field: String,
        /// What it should be.
        expected: String,
        /// What it is.
        got: String,
    },
    /// A tensor the model needs is not there.
    #[error("tensor {tensor} is missing from {place}")]
    MissingTensor {
        /// Its name.
        tensor: String,
        /// Where it should be.
        place: String,
    },
    /// A tensor does not fit the configuration.
    #[error("tensor {tensor}: expected {expected}, got {got}")]
    Tensor {
        /// Its name.
        tensor: String,
        /// What it should be.
        expected: String,
        /// What it is.
        got: String,
    },
    /// The model's architecture has no mapping.
    #[error("architecture {got:?} cannot be imported from GGUF; supported: {supported}")]
    Architecture {
        /// The architecture's name.
        got: String,
        /// Those that can.
        supported: String,
    },
    /// The tokenizer has no mapping.
    #[error("tokenizer: {field} {got:?} cannot be imported from GGUF; supported: {supported}")]
    TokenizerKind {
        /// The metadata key.
        field: &'static str,
        /// Its value.
        got: String,
        /// Those that can.
        supported: String,
    },
    /// The tokenizer is unusable.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// No guest fits the model.
    #[error("{0}")]
    Guest(String),
    /// The written package, or a file of the source, is unusable.
    #[error(transparent)]
    Package(#[from] PackageError),
}

/// Imports a model.
///
/// # Errors
/// Says what is wrong with the source, which tensor or field, or what is in the way. Nothing is left behind.
pub fn import(
    request: &ImportRequest<'_>,
    chooser: &dyn GuestChooser,
    progress: &dyn Progress,
    cancelled: &AtomicBool,
) -> Result<Package, ImportError> {
    if !is_name(request.name) {
        return Err(ImportError::Name(request.name.to_owned()));
    }
    let target = request.models_dir.join(request.name);
    if target.exists() && !request.replace {
        return Err(ImportError::Exists(request.name.to_owned()));
    }
    progress.stage("read", 0);
    let source = read_source(request.source)?;
    let tokenizer = Tokenizer::from_bytes(&source.tokenizer_json)?;
    let architecture = chooser
        .architecture(&source.model_type)
        .map_err(ImportError::Guest)?;
    let template = source.chat.template.as_deref();
    let chat = chooser
        .chat(template, &tokenizer.special_tokens())
        .map_err(ImportError::Guest)?;
    let weights = WeightIndex {
        tensors: source.plan.infos(),
    };
    chooser
        .check(
            &architecture,
            &String::from_utf8_lossy(&source.config_json),
            &weights,
        )
        .map_err(ImportError::Guest)?;
    check_cancelled(cancelled)?;
    writer::write_package(request, source, [&architecture, &chat], progress, cancelled)
}

/// A model as found at the source: everything but the weights' bytes.
struct Source {
    model_type: String,
    config_json: Vec<u8>,
    tokenizer_json: Vec<u8>,
    context_tokens_max: u32,
    license: Option<String>,
    chat: ChatManifest,
    plan: plan::WeightPlan,
}

fn read_source(path: &Path) -> Result<Source, ImportError> {
    if path.join("config.json").is_file() {
        hf_source::read(path)
    } else if path.is_file() {
        gguf_source::read(path)
    } else {
        Err(ImportError::Source(path.display().to_string()))
    }
}

fn check_cancelled(cancelled: &AtomicBool) -> Result<(), ImportError> {
    if cancelled.load(Ordering::Relaxed) {
        Err(ImportError::Cancelled)
    } else {
        Ok(())
    }
}

fn io<'a>(operation: &'static str, path: &'a Path) -> impl Fn(std::io::Error) -> ImportError + 'a {
    move |source| ImportError::Io {
        operation,
        path: path.display().to_string(),
        source,
    }
}

/// The name of the source without its folders, for the manifest.
fn source_name(path: &Path) -> String {
    let resolved: PathBuf = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    resolved.file_name().map_or_else(
        || "unknown".to_owned(),
        |name| name.to_string_lossy().into_owned(),
    )
}

#[cfg(test)]
mod tests;
