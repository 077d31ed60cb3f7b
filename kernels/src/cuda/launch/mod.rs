//! Launchers, one file per kernel file and named as it: from shapes and addresses to a [`super::driver::Launch`]. They check nothing that
//! the program's gate has checked, and touch no memory.

pub mod attention;
pub mod dequantize;
pub mod embedding;
pub mod linear;
pub mod linear_exact;
pub mod linear_small;
pub mod norm;
