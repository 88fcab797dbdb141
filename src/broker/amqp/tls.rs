//! TLS as py-amqp does it: the certificate's chain is checked, its name only where `server_hostname` asks for it.

use std::io;
use std::sync::Arc;

use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::client::WebPkiServerVerifier;
use tokio_rustls::rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use tokio_rustls::rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use tokio_rustls::rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme,
};

use super::address::{Name, TlsOptions, Verify};

/// The handshake.
pub(super) async fn connect(
    socket: TcpStream,
    host: &str,
    options: &TlsOptions,
) -> io::Result<TlsStream<TcpStream>> {
    let name = match &options.name {
        Name::Unchecked | Name::Host => host,
        Name::Given(name) => name,
    };
    let name = ServerName::try_from(name.to_owned()).map_err(io::Error::other)?;
    TlsConnector::from(Arc::new(config(options)?)).connect(name, socket).await
}

fn config(options: &TlsOptions) -> io::Result<ClientConfig> {
    let provider = Arc::new(ring::default_provider());
    let verifier = Arc::new(Verifier {
        chain: match options.verify {
            Verify::Required => Some(
                WebPkiServerVerifier::builder_with_provider(
                    Arc::new(authorities(options)?),
                    provider.clone(),
                )
                .build()
                .map_err(io::Error::other)?,
            ),
            Verify::Nothing => None,
        },
        name: options.name != Name::Unchecked,
        provider: provider.clone(),
    });
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(io::Error::other)?
        .dangerous()
        .with_custom_certificate_verifier(verifier);
    let Some(file) = &options.certificate_file else { return Ok(builder.with_no_client_auth()) };
    let chain = certificates(file)?;
    // As Python: the key may be in the certificate's file.
    let key_file = options.key_file.as_ref().unwrap_or(file);
    let key = PrivateKeyDer::from_pem_file(key_file).map_err(|error| unreadable(key_file, error))?;
    builder.with_client_auth_cert(chain, key).map_err(io::Error::other)
}

/// Whom to trust: the file's, or else the system's.
fn authorities(options: &TlsOptions) -> io::Result<RootCertStore> {
    let mut store = RootCertStore::empty();
    match &options.authorities_file {
        Some(file) => {
            for certificate in certificates(file)? {
                store.add(certificate).map_err(|error| unreadable(file, error))?;
            }
        }
        None => {
            store.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        }
    }
    if store.is_empty() {
        return Err(io::Error::other(
            "there is no certificate authority to trust; see broker_use_ssl, ca_certs",
        ));
    }
    Ok(store)
}

fn certificates(file: &str) -> io::Result<Vec<CertificateDer<'static>>> {
    CertificateDer::pem_file_iter(file)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|error| unreadable(file, error))
}

fn unreadable(file: &str, error: impl std::fmt::Display) -> io::Error {
    io::Error::other(format!("broker_use_ssl: {file}: {error}"))
}

/// Checks what it is told to check.
#[derive(Debug)]
struct Verifier {
    /// Checks chain and name; none: any certificate will do.
    chain: Option<Arc<WebPkiServerVerifier>>,
    name: bool,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let Some(chain) = &self.chain else { return Ok(ServerCertVerified::assertion()) };
        match chain.verify_server_cert(certificate, intermediates, name, ocsp, now) {
            // The name is looked at last, when the chain has been found good.
            Err(Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) if !self.name => Ok(ServerCertVerified::assertion()),
            outcome => outcome,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(
            message,
            certificate,
            signature,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(
            message,
            certificate,
            signature,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
