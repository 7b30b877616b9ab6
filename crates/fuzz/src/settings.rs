//! The server's configuration file.

use fathom_server::ServerConfig;

/// Any text gives settings or an error that names a line, and settings are checked without a panic.
///
/// # Panics
/// If an error says nothing.
pub fn server_config(data: &[u8]) {
    let Ok(text) = str::from_utf8(data) else { return };
    match toml::from_str::<ServerConfig>(text) {
        Ok(config) => {
            if let Err(error) = config.check() {
                assert!(error.to_string().contains('`'), "{error} names nothing");
            }
        }
        Err(error) => assert!(!error.message().is_empty(), "an error says something"),
    }
}
