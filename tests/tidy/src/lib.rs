//! The rules of the design as a test.
