//! The data folder: which models are in it. Opens packages; importing is another module's work.

use std::path::{Path, PathBuf};

use galerne_core::name::{NAME_FORM, is_name};

use crate::package::{Manifest, Package, PackageError};

/// Why the data folder could not be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
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
    /// The name cannot be a model's.
    #[error("model name {0:?}: expected {NAME_FORM}")]
    Name(String),
    /// There is no such model.
    #[error("no model {name:?} in {models_dir}; it has {}", listed(.known))]
    NotFound {
        /// The name asked for.
        name: String,
        /// Where it was looked for.
        models_dir: String,
        /// Names that exist.
        known: Vec<String>,
    },
    /// The package is unusable.
    #[error("model {name:?}: {source}")]
    Package {
        /// The model's name.
        name: String,
        /// What is wrong with it.
        source: PackageError,
    },
}

fn listed(names: &[String]) -> String {
    if names.is_empty() {
        "no models".to_owned()
    } else {
        names.join(", ")
    }
}

/// One model of the data folder.
#[derive(Debug)]
pub struct ModelEntry {
    /// Its name: the folder's.
    pub name: String,
    /// Bytes of all its files; 0 for a broken package.
    pub size_bytes: u64,
    /// Its manifest, or why it cannot be opened. A broken package does not hide the others.
    pub manifest: Result<Manifest, PackageError>,
}

/// A data folder.
#[derive(Debug, Clone)]
pub struct Store {
    models_dir: PathBuf,
}

impl Store {
    /// The store in the folder `data`, which is created with its first import.
    #[must_use]
    pub fn new(data: &Path) -> Self {
        Self {
            models_dir: data.join("models"),
        }
    }

    /// The folder with one folder for each model.
    #[must_use]
    pub fn models_dir(&self) -> &Path {
        &self.models_dir
    }

    /// All models, by name. Empty if there is no data folder yet.
    ///
    /// # Errors
    /// If the folder cannot be read.
    pub fn list(&self) -> Result<Vec<ModelEntry>, StoreError> {
        let entry = |name: String| {
            let opened = Package::open(&self.models_dir.join(&name))
                .and_then(|package| Ok((package.size_bytes()?, package.manifest().clone())));
            match opened {
                Ok((size_bytes, manifest)) => ModelEntry {
                    name,
                    size_bytes,
                    manifest: Ok(manifest),
                },
                Err(error) => ModelEntry {
                    name,
                    size_bytes: 0,
                    manifest: Err(error),
                },
            }
        };
        Ok(self.names()?.into_iter().map(entry).collect())
    }

    /// Opens the model called `name`.
    ///
    /// # Errors
    /// If there is none, or its package is unusable.
    pub fn open(&self, name: &str) -> Result<Package, StoreError> {
        let dir = self.existing(name)?;
        Package::open(&dir).map_err(|source| StoreError::Package {
            name: name.to_owned(),
            source,
        })
    }

    /// Removes the model called `name` with all its files.
    ///
    /// # Errors
    /// If there is none, or its folder cannot be removed.
    pub fn remove(&self, name: &str) -> Result<(), StoreError> {
        let dir = self.existing(name)?;
        // Renamed first: readers see the whole package or none.
        let doomed = self
            .models_dir
            .join(format!(".removed-{name}-{}", std::process::id()));
        std::fs::rename(&dir, &doomed).map_err(|source| io("rename", &dir, source))?;
        std::fs::remove_dir_all(&doomed).map_err(|source| io("remove", &doomed, source))
    }

    fn existing(&self, name: &str) -> Result<PathBuf, StoreError> {
        if !is_name(name) {
            return Err(StoreError::Name(name.to_owned()));
        }
        let dir = self.models_dir.join(name);
        if dir.is_dir() {
            return Ok(dir);
        }
        let models_dir = self.models_dir.display().to_string();
        Err(StoreError::NotFound {
            name: name.to_owned(),
            models_dir,
            known: self.names()?,
        })
    }

    /// Folders whose names can be models'; unfinished imports begin with a dot and are none.
    fn names(&self) -> Result<Vec<String>, StoreError> {
        let entries = match std::fs::read_dir(&self.models_dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(source) => return Err(io("read", &self.models_dir, source)),
        };
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry.map_err(|source| io("read", &self.models_dir, source))?;
            match entry.file_name().into_string() {
                Ok(name) if is_name(&name) && entry.path().is_dir() => names.push(name),
                _ => {}
            }
        }
        names.sort_unstable();
        Ok(names)
    }
}

fn io(operation: &'static str, path: &Path, source: std::io::Error) -> StoreError {
    StoreError::Io {
        operation,
        path: path.display().to_string(),
        source,
    }
}
