//! The archive of compiled kernels that `cargo xtask kernels` writes: what is in it for which GPU. Knows no driver and no file.
//!
//! Text first, a line each: `galerne-kernels 1`; `compiler NAME`; for each module
//! `module NAME ARCH BYTES PACKED_BYTES KERNEL,KERNEL,…`; an empty line. Then the modules in that order, each in zlib's format, which has a
//! checksum.

use std::fmt;

use miniz_oxide::inflate::decompress_to_vec_zlib_with_limit;

const MAGIC: &str = "galerne-kernels 1";
/// Far more than any module has; bounds what a damaged archive can take.
const MODULE_BYTES_MAX: usize = 64 << 20;

/// What kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Arch {
    /// Hopper: H100, H200, GH200.
    Sm90a,
    /// Blackwell: B200, GB200.
    Sm100a,
    /// Newer GPUs of other kinds: the driver compiles the kernels when it loads them. Without tensor memory access and the
    /// matrix instructions of one architecture.
    Ptx,
}

impl Arch {
    /// Everything kernels are compiled for.
    pub const ALL: [Self; 3] = [Self::Sm90a, Self::Sm100a, Self::Ptx];

    /// What a GPU of this compute capability runs, if there are kernels for it.
    #[must_use]
    pub const fn of_capability(capability: (i32, i32)) -> Option<Self> {
        match capability {
            (9, 0) => Some(Self::Sm90a),
            (10, 0) => Some(Self::Sm100a),
            (9.., _) => Some(Self::Ptx),
            _ => None,
        }
    }

    /// For example `sm_90a`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sm90a => "sm_90a",
            Self::Sm100a => "sm_100a",
            Self::Ptx => "compute_90",
        }
    }

    fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|arch| arch.name() == name)
    }
}

impl fmt::Display for Arch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Why an archive cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ImageError {
    /// It is no archive, or a cut one.
    #[error(
        "archive of CUDA kernels: {what}: expected {expected}, got {got:?}; run cargo xtask kernels and build again"
    )]
    Format {
        /// The part.
        what: &'static str,
        /// What would be accepted.
        expected: &'static str,
        /// What is there.
        got: String,
    },
    /// A module does not inflate to what the header says.
    #[error(
        "archive of CUDA kernels: module {module} for {arch} is damaged; run cargo xtask kernels and build again"
    )]
    Damaged {
        /// Its name.
        module: &'static str,
        /// Compiled for.
        arch: Arch,
    },
}

/// One file of kernels, compiled for one architecture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Module {
    /// The file under `kernels/cuda`, without its ending.
    pub name: &'static str,
    /// Compiled for.
    pub arch: Arch,
    /// Its entry points.
    pub kernels: Vec<&'static str>,
    bytes: usize,
    packed: &'static [u8],
}

impl Module {
    /// What the driver loads: a cubin, or PTX with a zero at its end.
    ///
    /// # Errors
    /// The archive is damaged.
    pub fn code(&self) -> Result<Vec<u8>, ImageError> {
        match decompress_to_vec_zlib_with_limit(self.packed, self.bytes.min(MODULE_BYTES_MAX)) {
            Ok(code) if code.len() == self.bytes => Ok(code),
            _ => Err(ImageError::Damaged {
                module: self.name,
                arch: self.arch,
            }),
        }
    }
}

/// An opened archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    compiler: &'static str,
    modules: Vec<Module>,
}

impl Image {
    /// Reads the header; modules are inflated when they are asked for.
    ///
    /// # Errors
    /// It is no archive.
    pub fn open(archive: &'static [u8]) -> Result<Self, ImageError> {
        let blank = archive.windows(2).position(|pair| pair == b"\n\n");
        let header = blank.and_then(|end| std::str::from_utf8(&archive[..end]).ok());
        let (Some(blank), Some(header)) = (blank, header) else {
            return Err(format_error("header", "lines of text", ""));
        };
        let mut lines = header.lines();
        if lines.next() != Some(MAGIC) {
            return Err(format_error(
                "first line",
                MAGIC,
                header.lines().next().unwrap_or(""),
            ));
        }
        let line = lines.next().unwrap_or("");
        let Some(compiler) = line.strip_prefix("compiler ") else {
            return Err(format_error("second line", "compiler NAME", line));
        };
        let mut rest = &archive[blank + 2..];
        let mut modules = Vec::new();
        for line in lines {
            modules.push(module(line, &mut rest)?);
        }
        if !rest.is_empty() {
            return Err(format_error(
                "end",
                "nothing behind the last module",
                &format!("{} bytes", rest.len()),
            ));
        }
        Ok(Self { compiler, modules })
    }

    /// What compiled them, for example `nvcc 13.0.88`.
    #[must_use]
    pub fn compiler(&self) -> &'static str {
        self.compiler
    }

    /// Modules for this architecture.
    pub fn modules(&self, arch: Arch) -> impl Iterator<Item = &Module> {
        self.modules.iter().filter(move |module| module.arch == arch)
    }
}

/// One line of the header, and its bytes off the front of the rest.
fn module(line: &'static str, rest: &mut &'static [u8]) -> Result<Module, ImageError> {
    let parsed = (|| {
        let mut words = line.strip_prefix("module ")?.split(' ');
        let name = words.next()?;
        let arch = Arch::parse(words.next()?)?;
        let bytes: usize = words.next()?.parse().ok()?;
        let packed_bytes: usize = words.next()?.parse().ok()?;
        let kernels: Vec<&str> = words.next()?.split(',').collect();
        let (packed, behind) = rest.split_at_checked(packed_bytes)?;
        *rest = behind;
        Some(Module {
            name,
            arch,
            kernels,
            bytes,
            packed,
        })
    })();
    parsed.ok_or_else(|| {
        format_error(
            "module",
            "module NAME ARCH BYTES PACKED_BYTES KERNELS, and its bytes",
            line,
        )
    })
}

fn format_error(what: &'static str, expected: &'static str, got: &str) -> ImageError {
    ImageError::Format {
        what,
        expected,
        got: got.chars().take(80).collect(),
    }
}

#[cfg(test)]
mod tests {
    use miniz_oxide::deflate::compress_to_vec_zlib;

    use super::*;

    fn archive(lines: &str, bodies: &[u8]) -> &'static [u8] {
        let mut bytes = lines.as_bytes().to_vec();
        bytes.extend(bodies);
        bytes.leak()
    }

    #[test]
    fn gives_the_modules_of_an_architecture() {
        let (cubin, ptx) = (vec![7_u8; 1_000], b".version 9.0\0".to_vec());
        let bodies = [compress_to_vec_zlib(&cubin, 9), compress_to_vec_zlib(&ptx, 9)];
        let lines = format!(
            "galerne-kernels 1\ncompiler nvcc 13\nmodule norm sm_90a 1000 {} norm_rms,norm_layer\nmodule norm compute_90 13 {} \
             norm_rms\n\n",
            bodies[0].len(),
            bodies[1].len()
        );
        let image = Image::open(archive(&lines, &bodies.concat())).expect("an archive");
        assert_eq!(image.compiler(), "nvcc 13");
        let of = |arch| image.modules(arch).collect::<Vec<_>>();
        let module = of(Arch::Sm90a)[0];
        assert_eq!(
            (module.name, module.kernels.as_slice()),
            ("norm", ["norm_rms", "norm_layer"].as_slice())
        );
        assert_eq!(module.code(), Ok(cubin));
        assert_eq!(of(Arch::Ptx)[0].code(), Ok(ptx));
        assert!(of(Arch::Sm100a).is_empty());
    }

    #[test]
    fn a_damaged_archive_is_an_error() {
        let body = compress_to_vec_zlib(&[1, 2, 3], 9);
        let lines = |bytes, packed| {
            format!("galerne-kernels 1\ncompiler nvcc 13\nmodule norm sm_90a {bytes} {packed} norm_rms\n\n")
        };
        for cut in [
            b"".as_slice(),
            b"galerne-kernels 2\n\n",
            b"galerne-kernels 1\ncompiler nvcc\nmodule\n\n",
        ] {
            assert!(
                matches!(Image::open(cut), Err(ImageError::Format { .. })),
                "{cut:?}"
            );
        }
        for packed in [body.len() - 1, body.len() + 1] {
            let error = Image::open(archive(&lines(3, packed), &body));
            assert!(matches!(error, Err(ImageError::Format { .. })), "{packed}");
        }
        let mut wrong = body.clone();
        wrong[3] ^= 1;
        for (bytes, body) in [(2, &body), (4, &body), (3, &wrong)] {
            let image = Image::open(archive(&lines(bytes, body.len()), body)).expect("the header is right");
            let code = image.modules(Arch::Sm90a).next().expect("a module").code();
            assert!(matches!(code, Err(ImageError::Damaged { .. })), "{bytes}");
        }
    }

    #[test]
    fn a_gpu_gets_its_own_code_or_ptx() {
        assert_eq!(Arch::of_capability((8, 9)), None);
        assert_eq!(Arch::of_capability((9, 0)), Some(Arch::Sm90a));
        assert_eq!(Arch::of_capability((10, 0)), Some(Arch::Sm100a));
        assert_eq!(Arch::of_capability((10, 3)), Some(Arch::Ptx));
        assert_eq!(Arch::of_capability((12, 0)), Some(Arch::Ptx));
    }
}
