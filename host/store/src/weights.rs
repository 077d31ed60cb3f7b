//! A package's weights, read tensor by tensor. Knows tensor files and nothing of packages.
//!
//! Not mapped into memory: a device packs every tensor into memory of its own, and the pages of a mapping would count
//! beside it. The files stay open, so that a package that is replaced meanwhile is read to its end.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use galerne_core::weights::{WeightIndex, WeightReadError, WeightSource, WeightView};

use crate::package::{PackageError, open_file};
use crate::tensor_file::read_header;

/// All weights of a package; their bytes come from disk whenever they are asked for.
#[derive(Debug)]
pub struct PackageWeights {
    // Locked to seek and read.
    files: Vec<Mutex<File>>,
    index: WeightIndex,
    places: BTreeMap<String, Place>,
}

#[derive(Debug)]
struct Place {
    file: usize,
    start: u64,
    size_bytes: usize,
}

impl PackageWeights {
    /// Opens `paths` and checks their headers.
    ///
    /// # Errors
    /// Names the file, and the tensor if one is at fault; also if two files hold a tensor of the same name.
    pub(crate) fn open(paths: &[PathBuf]) -> Result<Self, PackageError> {
        let mut weights = Self {
            files: Vec::new(),
            index: WeightIndex::default(),
            places: BTreeMap::new(),
        };
        for path in paths {
            let fault = |source| PackageError::Weights {
                file: path.display().to_string(),
                source,
            };
            let (file, size_bytes) = open_file(path)?;
            let tensors = read_header(BufReader::new(&file), size_bytes)
                .map_err(fault)?
                .tensors;
            for (name, tensor) in tensors {
                // The header check keeps every tensor inside the file.
                let place = Place {
                    file: weights.files.len(),
                    start: tensor.start,
                    size_bytes: tensor.size_bytes as usize,
                };
                if weights.places.insert(name.clone(), place).is_some() {
                    return Err(PackageError::DuplicateTensor {
                        file: path.display().to_string(),
                        tensor: name,
                    });
                }
                weights.index.tensors.insert(name, tensor.info);
            }
            weights.files.push(Mutex::new(file));
        }
        Ok(weights)
    }

    fn read(&self, place: &Place) -> std::io::Result<Vec<u8>> {
        // A panic while the lock is held leaves the file as it was; every reader seeks first.
        let mut file = self.files[place.file]
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        file.seek(SeekFrom::Start(place.start))?;
        let mut bytes = vec![0; place.size_bytes];
        file.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    /// Bytes of all tensors together.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.places.values().map(|place| place.size_bytes as u64).sum()
    }
}

impl WeightSource for PackageWeights {
    fn weight(&self, name: &str) -> Result<Option<WeightView<'_>>, WeightReadError> {
        let (Some(info), Some(place)) = (self.index.tensors.get(name), self.places.get(name)) else {
            return Ok(None);
        };
        let bytes = self.read(place).map_err(|source| WeightReadError {
            name: name.to_owned(),
            source,
        })?;
        Ok(Some(WeightView {
            dtype: info.dtype,
            shape: &info.shape,
            bytes: bytes.into(),
        }))
    }

    fn index(&self) -> &WeightIndex {
        &self.index
    }
}
