//! Judges foreign bytes for the corpus test and the fuzz targets: what a reader accepts must lie inside the file.

use galerne_store::gguf::{Gguf, GgufLimits};
use galerne_store::tensor_file::read_header;

/// A format with a reader of ours.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Format {
    /// GGUF.
    #[allow(dead_code, reason = "each fuzz target uses one of the two")]
    Gguf,
    /// safetensors.
    #[allow(dead_code, reason = "each fuzz target uses one of the two")]
    Safetensors,
}

impl Format {
    /// Reads the header of a file with these bytes; gives the reader's refusal.
    ///
    /// # Panics
    /// If the reader accepts tensors that reach out of the file or share bytes.
    pub(crate) fn read(self, bytes: &[u8]) -> Result<(), String> {
        let size = bytes.len() as u64;
        let mut spans: Vec<(u64, u64, String)> = match self {
            Self::Gguf => {
                let gguf =
                    Gguf::read(bytes, size, &GgufLimits::default()).map_err(|error| error.to_string())?;
                let tensors = gguf.tensors.into_iter();
                tensors
                    .map(|(name, tensor)| (tensor.start, tensor.size_bytes, name))
                    .collect()
            }
            Self::Safetensors => {
                let file = read_header(bytes, size).map_err(|error| error.to_string())?;
                let tensors = file.tensors.into_iter();
                tensors
                    .map(|(name, tensor)| (tensor.start, tensor.size_bytes, name))
                    .collect()
            }
        };
        spans.retain(|(_, size_bytes, _)| *size_bytes > 0);
        spans.sort_unstable();
        let mut free = 0;
        for (start, size_bytes, name) in spans {
            assert!(
                start >= free,
                "tensor {name} begins at {start}, inside another that ends at {free}"
            );
            free = start + size_bytes;
            assert!(
                free <= size,
                "tensor {name} ends at {free}, the file has {size} bytes"
            );
        }
        Ok(())
    }
}
