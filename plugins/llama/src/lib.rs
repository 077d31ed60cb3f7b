//! First-party guest: llama.
