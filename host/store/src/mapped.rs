//! A package's weights, mapped into memory. Knows tensor files and nothing of packages.
//!
//! The mapping goes through the `filebuffer` crate, whose safe interface assumes that nobody writes to the file
//! meanwhile. Packages keep that: importers write into a new folder and rename it, and never touch a file again.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::PathBuf;

use filebuffer::FileBuffer;
use galerne_core::weights::{WeightIndex, WeightSource, WeightView};

use crate::package::PackageError;
use crate::tensor_file::read_header;

/// All weights of a package; their bytes come from disk when first read.
#[derive(Debug)]
pub struct MappedWeights {
    files: Vec<FileBuffer>,
    index: WeightIndex,
    places: BTreeMap<String, Place>,
}

#[derive(Debug)]
struct Place {
    file: usize,
    bytes: Range<usize>,
}

impl MappedWeights {
    /// Maps `paths` and checks their headers.
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
            let buffer = FileBuffer::open(path).map_err(|source| PackageError::Io {
                operation: "map",
                path: path.display().to_string(),
                source,
            })?;
            let file = read_header(&buffer[..], buffer.len() as u64).map_err(fault)?;
            for (name, tensor) in file.tensors {
                // The header check keeps every tensor inside the file, and the file is mapped: both fit a usize.
                let start = tensor.start as usize;
                let place = Place {
                    file: weights.files.len(),
                    bytes: start..start + tensor.size_bytes as usize,
                };
                if weights.places.insert(name.clone(), place).is_some() {
                    return Err(PackageError::DuplicateTensor {
                        file: path.display().to_string(),
                        tensor: name,
                    });
                }
                weights.index.tensors.insert(name, tensor.info);
            }
            weights.files.push(buffer);
        }
        Ok(weights)
    }

    /// Bytes of all tensors together.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.places.values().map(|place| place.bytes.len() as u64).sum()
    }
}

impl WeightSource for MappedWeights {
    fn weight(&self, name: &str) -> Option<WeightView<'_>> {
        let info = self.index.tensors.get(name)?;
        let place = self.places.get(name)?;
        let bytes = self.files.get(place.file)?.get(place.bytes.clone())?;
        Some(WeightView {
            dtype: info.dtype,
            shape: &info.shape,
            bytes,
        })
    }

    fn index(&self) -> &WeightIndex {
        &self.index
    }
}
