//! Packages on disk, importers, tokenizers.
