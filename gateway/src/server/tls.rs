//! TLS 1.2 and 1.3 of a listener. Certificate chain, key and, if configured, the authorities of client certificates are
//! read from PEM files, again on reload.

use std::path::Path;
use std::sync::Arc;

use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{RootCertStore, ServerConfig};

use crate::config::TlsConfig;

/// TLS acceptor. Cheap to clone.
pub type Tls = TlsAcceptor;

/// Reads the PEM files. An error names the file.
pub fn load_tls(config: &TlsConfig) -> Result<Tls, String> {
    let named = |path: &Path, error: &dyn std::fmt::Display| format!("tls: `{}`: {error}", path.display());
    let chain = certificates(&config.certificate)?;
    let key = PrivateKeyDer::from_pem_file(&config.key).map_err(|error| named(&config.key, &error))?;
    let builder = ServerConfig::builder();
    let builder = match &config.client_ca {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let mut roots = RootCertStore::empty();
            for authority in certificates(path)? {
                roots.add(authority).map_err(|error| named(path, &error))?;
            }
            let verifier = WebPkiClientVerifier::builder(Arc::new(roots))
                // A client without a certificate may authenticate with a key.
                .allow_unauthenticated()
                .build()
                .map_err(|error| named(path, &error))?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    let mut server =
        builder.with_single_cert(chain, key).map_err(|error| named(&config.certificate, &error))?;
    server.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(server)))
}

/// Reads the certificates of a PEM file, at least one.
pub fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let named = |error: &dyn std::fmt::Display| format!("tls: `{}`: {error}", path.display());
    let chain: Result<Vec<_>, _> =
        CertificateDer::pem_file_iter(path).map_err(|error| named(&error))?.collect();
    let chain = chain.map_err(|error| named(&error))?;
    if chain.is_empty() { Err(named(&"no certificate in it")) } else { Ok(chain) }
}
