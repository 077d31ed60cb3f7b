//! First-party guest: hostile.
