//! A certificate of our own, and what the Secret says of it.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use jiff::Timestamp;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use serde::{Deserialize, Serialize};

/// How long a certificate is good: 90 days. It is renewed when two thirds of that are over.
const LIFE: Duration = Duration::from_secs(90 * 24 * 3600);

/// By how much other machines' clocks may be behind ours.
const SKEW: Duration = Duration::from_secs(3600);

/// The key of [`About`] in the Secret.
const ABOUT: &str = "weightd.json";

/// A certificate with its key.
pub(in crate::controller) struct Made {
    /// The authority that signed it, before that the last one's successors: PEM.
    pub authorities: String,
    chain: String,
    key: String,
    /// What it is for, and until when.
    pub about: About,
}

/// What need not be read from the certificate itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::controller) struct About {
    names: Vec<String>,
    /// When it is to be replaced.
    pub renew_after: Timestamp,
}

impl Made {
    /// A new certificate for `names`. Who still meets the one `before` it is to believe that, too.
    pub(in crate::controller) fn make(
        names: &[String],
        before: Option<&Self>,
    ) -> Result<Self, rcgen::Error> {
        let now = SystemTime::now();
        let signing = KeyPair::generate()?;
        let mut authority = params(&[], now)?;
        authority.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        authority.key_usages = vec![
            KeyUsagePurpose::KeyCertSign,
            KeyUsagePurpose::DigitalSignature,
        ];
        // Two authorities of one name would be taken for one another.
        let name = format!("weightd webhook {}", uuid::Uuid::new_v4());
        authority.distinguished_name.push(DnType::CommonName, name);
        let root = authority.self_signed(&signing)?;

        let key = KeyPair::generate()?;
        let mut leaf = params(names, now)?;
        leaf.distinguished_name
            .push(DnType::CommonName, "weightd webhook");
        leaf.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        leaf.use_authority_key_identifier_extension = true;
        let chain = leaf.signed_by(&key, &Issuer::from_params(&authority, &signing))?;

        let renew_after = Timestamp::try_from(now + LIFE * 2 / 3);
        Ok(Self {
            authorities: root.pem() + before.map(Self::authority).unwrap_or_default(),
            chain: chain.pem(),
            key: key.serialize_pem(),
            about: About {
                names: names.to_vec(),
                renew_after: renew_after.expect("the year has four digits"),
            },
        })
    }

    /// The one authority that signed it.
    fn authority(&self) -> &str {
        const END: &str = "-----END CERTIFICATE-----";
        let end = self.authorities.find(END).map(|at| at + END.len());
        end.map_or("", |end| &self.authorities[..end])
    }

    /// What the Secret holds; `None` if that is nothing of ours, or damaged.
    pub(in crate::controller) fn read(secret: &Secret) -> Option<Self> {
        let data = secret.data.as_ref()?;
        let text = |key: &str| String::from_utf8(data.get(key)?.0.clone()).ok();
        let made = Self {
            authorities: text("ca.crt")?,
            chain: text("tls.crt")?,
            key: text("tls.key")?,
            about: serde_json::from_str(&text(ABOUT)?).ok()?,
        };
        let fits = super::Current::default().set("", made.chain.as_bytes(), made.key.as_bytes());
        fits.ok().map(|()| made)
    }

    /// What the Secret is to hold.
    pub(in crate::controller) fn data(&self) -> BTreeMap<String, ByteString> {
        let about = serde_json::to_string(&self.about).expect("it is JSON");
        [
            ("ca.crt", &self.authorities),
            ("tls.crt", &self.chain),
            ("tls.key", &self.key),
            (ABOUT, &about),
        ]
        .into_iter()
        .map(|(key, text)| (key.to_owned(), ByteString(text.clone().into_bytes())))
        .collect()
    }

    /// Whether it is for just these names.
    pub(in crate::controller) fn is_for(&self, names: &[String]) -> bool {
        self.about.names == names
    }

    /// Whether it is to be replaced.
    pub(in crate::controller) fn is_old(&self) -> bool {
        self.about.renew_after <= Timestamp::now()
    }
}

fn params(names: &[String], now: SystemTime) -> Result<CertificateParams, rcgen::Error> {
    let mut params = CertificateParams::new(names)?;
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.not_before = (now - SKEW).into();
    params.not_after = (now + LIFE).into();
    Ok(params)
}
