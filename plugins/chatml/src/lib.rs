//! First-party guest: chatml.
