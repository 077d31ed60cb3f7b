//! Certificates and TLS settings: the development certificate, PEM files, ALPN. Knows no sockets.

use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, ExtendedKeyUsagePurpose,
    IsCa, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256,
};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::server::ParsedCertificate;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::TlsError;

/// Browsers accept a certificate by its hash only if it is valid for at most 14 days.
const VALIDITY: Duration = Duration::from_secs(13 * 24 * 3600);
/// A certificate with less than this left is replaced.
const RENEWAL: Duration = Duration::from_secs(24 * 3600);
/// Clocks of clients may run behind ours.
const CLOCK_SKEW: Duration = Duration::from_secs(3600);
/// Names that every development certificate carries.
const LOCAL_NAMES: [&str; 3] = ["localhost", "127.0.0.1", "::1"];

/// Certificate chain and private key, both PEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// The server's certificate, then intermediates.
    pub cert: PathBuf,
    /// PKCS#8, SEC1 or PKCS#1 key.
    pub key: PathBuf,
}

/// A certificate that `galerne serve` makes for itself; clients trust it by trusting its `cert.pem`.
#[derive(Debug, Clone)]
pub struct DevCertificate {
    /// Where it lies: `DIR/cert.pem` and `DIR/key.pem` (mode 0600).
    pub files: TlsFiles,
    /// When it ends.
    pub not_after: SystemTime,
    /// Names and addresses that it covers.
    pub names: Vec<String>,
    /// Base64 of the SHA-256 of the public key, for Chromium's `--ignore-certificate-errors-spki-list`.
    pub spki_sha256: String,
}

/// What is not worth parsing X.509 for. Written last; its digest ties it to the two files.
#[derive(Serialize, Deserialize)]
struct Meta {
    not_after_unix_s: u64,
    names: Vec<String>,
    pem_sha256: String,
}

impl DevCertificate {
    /// The certificate in `dir`, made anew when it is missing, damaged, has less than a day left or lacks one of
    /// `names`. `localhost`, `127.0.0.1` and `::1` are always covered; unspecified addresses (`0.0.0.0`) are left out.
    ///
    /// # Errors
    /// When `dir` cannot be written or a name is not a host name.
    pub fn load_or_create(dir: &Path, now: SystemTime, names: &[String]) -> Result<Self, TlsError> {
        let names = covered(names);
        match Self::load(dir)? {
            Some(found)
                if found.not_after >= now + RENEWAL && names.iter().all(|n| found.names.contains(n)) =>
            {
                Ok(found)
            }
            _ => Self::create(dir, now, names),
        }
    }

    fn load(dir: &Path) -> Result<Option<Self>, TlsError> {
        let files = TlsFiles {
            cert: dir.join("cert.pem"),
            key: dir.join("key.pem"),
        };
        let (Some(meta), Some(cert), Some(key)) = (
            read_if_there(&dir.join("meta.json"))?,
            read_if_there(&files.cert)?,
            read_if_there(&files.key)?,
        ) else {
            return Ok(None);
        };
        let Ok(meta) = serde_json::from_slice::<Meta>(&meta) else {
            return Ok(None);
        };
        if meta.pem_sha256 != digest(&cert, &key) {
            return Ok(None);
        }
        let spki_sha256 = spki_sha256(&files.cert)?;
        let not_after = UNIX_EPOCH + Duration::from_secs(meta.not_after_unix_s);
        Ok(Some(Self {
            files,
            not_after,
            names: meta.names,
            spki_sha256,
        }))
    }

    fn create(dir: &Path, now: SystemTime, names: Vec<String>) -> Result<Self, TlsError> {
        for name in &names {
            rustls_pki_types::ServerName::try_from(name.as_str())
                .map_err(|_| TlsError::Name { name: name.clone() })?;
        }
        let not_after = now + VALIDITY;
        let (cert_pem, key_pem) = generate(&names, now - CLOCK_SKEW, not_after)?;

        fs::create_dir_all(dir).map_err(file_error("create", dir))?;
        let files = TlsFiles {
            cert: dir.join("cert.pem"),
            key: dir.join("key.pem"),
        };
        let not_after_unix_s = not_after.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let pem_sha256 = digest(cert_pem.as_bytes(), key_pem.as_bytes());
        let meta = Meta {
            not_after_unix_s,
            names: names.clone(),
            pem_sha256,
        };
        replace(&files.key, key_pem.as_bytes(), 0o600)?;
        replace(&files.cert, cert_pem.as_bytes(), 0o644)?;
        let meta = serde_json::to_vec_pretty(&meta).expect("strings and a number always serialise");
        replace(&dir.join("meta.json"), &meta, 0o644)?;
        let spki_sha256 = spki_sha256(&files.cert)?;
        Ok(Self {
            files,
            not_after,
            names,
            spki_sha256,
        })
    }
}

/// Chain and key in PEM.
///
/// The certificate is signed by an authority of its own that comes along in the chain: OpenSSL and others trust only
/// certificates marked as an authority, and no client takes such a one for a server's. The authority's key is dropped
/// here, so nobody can ever sign a second certificate with it.
fn generate(
    names: &[String],
    not_before: SystemTime,
    not_after: SystemTime,
) -> Result<(String, String), TlsError> {
    let authority_key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let mut authority = CertificateParams::new(Vec::new())?;
    authority.not_before = not_before.into();
    authority.not_after = not_after.into();
    authority.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    authority.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    // Unlike names keep a verifier from trying one authority's key on another's certificate.
    let mark = hex(&Sha256::digest(authority_key.public_key_raw())[..4]);
    authority.distinguished_name = common_name(&format!("Galerne development authority {mark}"));

    let mut leaf = CertificateParams::new(names.to_vec())?;
    leaf.not_before = not_before.into();
    leaf.not_after = not_after.into();
    leaf.is_ca = IsCa::ExplicitNoCa;
    leaf.distinguished_name = common_name("Galerne development server");
    leaf.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    leaf.use_authority_key_identifier_extension = true;
    let leaf_key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;

    let authority = CertifiedIssuer::self_signed(authority, authority_key)?;
    let leaf = leaf.signed_by(&leaf_key, &authority)?;
    Ok((leaf.pem() + &authority.pem(), leaf_key.serialize_pem()))
}

fn common_name(text: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, text);
    name
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut hex, byte| {
        let _ = write!(hex, "{byte:02x}");
        hex
    })
}

fn covered(names: &[String]) -> Vec<String> {
    let mut all: Vec<String> = LOCAL_NAMES.iter().map(|&name| name.to_owned()).collect();
    for name in names {
        let unspecified = name.parse::<IpAddr>().is_ok_and(|ip| ip.is_unspecified());
        if !unspecified && !all.contains(name) {
            all.push(name.clone());
        }
    }
    all
}

fn digest(cert: &[u8], key: &[u8]) -> String {
    hex(&Sha256::new().chain_update(cert).chain_update(key).finalize())
}

fn file_error<'a>(operation: &'static str, path: &'a Path) -> impl Fn(std::io::Error) -> TlsError + 'a {
    move |source| TlsError::File {
        operation,
        path: path.to_owned(),
        source,
    }
}

fn read_if_there(path: &Path) -> Result<Option<Vec<u8>>, TlsError> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(file_error("read", path)(error)),
    }
}

/// Writes beside and renames, so that nobody ever reads half a file; the mode holds from the first byte.
fn replace(path: &Path, bytes: &[u8], mode: u32) -> Result<(), TlsError> {
    let temporary = path.with_extension(format!("{}.tmp", std::process::id()));
    let mut options = fs::OpenOptions::new();
    options.write(true).create(true).truncate(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, mode);
    #[cfg(not(unix))]
    let _ = mode;
    options
        .open(&temporary)
        .and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all()))
        .and_then(|()| fs::rename(&temporary, path))
        .map_err(file_error("write", path))
}

/// Base64 of the SHA-256 of the first certificate's public key.
///
/// # Errors
/// When the file is no PEM certificate.
pub fn spki_sha256(cert: &Path) -> Result<String, TlsError> {
    let chain = read_certificates(cert)?;
    let first = chain
        .first()
        .ok_or_else(|| pem_error(cert, "a certificate", &"none found"))?;
    let parsed = ParsedCertificate::try_from(first)?;
    Ok(base64(&Sha256::digest(parsed.subject_public_key_info().as_ref())))
}

/// RFC 4648 base64 with padding: one digest is not worth a dependency.
fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let word = (0..3).fold(0u32, |word, i| {
            word << 8 | u32::from(group.get(i).copied().unwrap_or(0))
        });
        for i in 0..4 {
            let index = word >> (18 - 6 * i) & 63;
            text.push(if i <= group.len() {
                char::from(ALPHABET[index as usize])
            } else {
                '='
            });
        }
    }
    text
}

fn pem_error(path: &Path, expected: &'static str, reason: &dyn std::fmt::Display) -> TlsError {
    TlsError::Pem {
        path: path.to_owned(),
        expected,
        reason: reason.to_string(),
    }
}

/// All certificates of a PEM file; at least one.
///
/// # Errors
/// When the file cannot be read or holds no certificate.
pub fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let bytes = fs::read(path).map_err(file_error("read", path))?;
    let chain: Vec<_> = CertificateDer::pem_slice_iter(&bytes)
        .collect::<Result<_, _>>()
        .map_err(|error| pem_error(path, "certificates", &error))?;
    if chain.is_empty() {
        return Err(pem_error(path, "certificates", &"none found"));
    }
    Ok(chain)
}

fn read_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    let bytes = fs::read(path).map_err(file_error("read", path))?;
    PrivateKeyDer::from_pem_slice(&bytes).map_err(|error| pem_error(path, "a private key", &error))
}

/// The one crypto provider, handed to every builder. The process default stays unset, so no order of calls matters.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

/// TLS settings of the two listeners.
pub(crate) struct ServerTls {
    /// TLS 1.3, ALPN `h3`.
    pub(crate) quic: rustls::ServerConfig,
    /// TLS 1.2 and 1.3, ALPN `h2` and `http/1.1`.
    pub(crate) tcp: rustls::ServerConfig,
}

impl ServerTls {
    /// Reads certificate and key and checks that they belong together.
    pub(crate) fn load(files: &TlsFiles) -> Result<Self, TlsError> {
        let chain = read_certificates(&files.cert)?;
        let key = read_key(&files.key)?;
        let mut quic = rustls::ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_no_client_auth()
            .with_single_cert(chain.clone(), key.clone_key())?;
        quic.alpn_protocols = vec![b"h3".to_vec()];
        let mut tcp = rustls::ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(chain, key)?;
        tcp.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(Self { quic, tcp })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn days(count: u64) -> Duration {
        Duration::from_secs(count * 24 * 3600)
    }

    fn made(dir: &Path, now: SystemTime, names: &[&str]) -> DevCertificate {
        let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
        DevCertificate::load_or_create(dir, now, &names).expect("certificate")
    }

    #[test]
    fn base64_pads_as_rfc_4648() {
        for (plain, text) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
        ] {
            assert_eq!(base64(plain.as_bytes()), text);
        }
        assert_eq!(base64(&[0xfb, 0xff, 0xfe]), "+//+");
    }

    #[test]
    fn certificate_is_kept_until_a_day_before_its_end() {
        let dir = tempfile::tempdir().expect("dir");
        let now = SystemTime::now();
        let first = made(dir.path(), now, &[]);
        assert!(first.not_after <= now + days(14));
        assert_eq!(
            made(dir.path(), now + days(11), &[]).spki_sha256,
            first.spki_sha256
        );
        let renewed = made(dir.path(), now + days(12) + Duration::from_secs(1), &[]);
        assert_ne!(renewed.spki_sha256, first.spki_sha256);
        assert!(renewed.not_after > first.not_after);
    }

    #[test]
    fn certificate_is_renewed_for_a_new_name_and_after_damage() {
        let dir = tempfile::tempdir().expect("dir");
        let now = SystemTime::now();
        let first = made(dir.path(), now, &["0.0.0.0"]);
        assert_eq!(first.names, ["localhost", "127.0.0.1", "::1"]);
        let named = made(dir.path(), now, &["gpu1.example"]);
        assert_ne!(named.spki_sha256, first.spki_sha256);
        assert_eq!(
            made(dir.path(), now, &[]).spki_sha256,
            named.spki_sha256,
            "fewer names are covered too"
        );
        fs::write(&named.files.cert, "-----BEGIN CERTIFICATE-----\n").expect("damage");
        let repaired = made(dir.path(), now, &["gpu1.example"]);
        assert!(ServerTls::load(&repaired.files).is_ok());
    }

    #[cfg(unix)]
    #[test]
    fn key_is_readable_by_its_owner_only() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().expect("dir");
        let cert = made(dir.path(), SystemTime::now(), &[]);
        let mode = fs::metadata(cert.files.key).expect("key").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn key_of_another_certificate_is_refused() {
        let (dir_one, dir_two) = (
            tempfile::tempdir().expect("dir"),
            tempfile::tempdir().expect("dir"),
        );
        let one = made(dir_one.path(), SystemTime::now(), &[]);
        let two = made(dir_two.path(), SystemTime::now(), &[]);
        let mixed = TlsFiles {
            cert: one.files.cert,
            key: two.files.key,
        };
        assert!(matches!(ServerTls::load(&mixed), Err(TlsError::Rejected(_))));
    }

    #[test]
    fn name_that_is_no_host_is_refused() {
        let dir = tempfile::tempdir().expect("dir");
        let error = DevCertificate::load_or_create(dir.path(), SystemTime::now(), &["a b".to_owned()]);
        assert!(matches!(error, Err(TlsError::Name { .. })));
    }
}
