//! First-party guest: mirostat.
