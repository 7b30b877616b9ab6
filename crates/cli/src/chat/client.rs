//! A chat client's side of HTTP: one connection per answer, dropped to cancel it.
//!
//! Plain HTTP only; where TLS is wanted it ends at a proxy, on this side as on the server's.

use anyhow::{Context, Result, bail, ensure};
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HOST};
use hyper::{Method, Request, Response, Uri};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use super::sse::{Delta, EventParser};

/// A server that speaks the OpenAI protocol.
#[derive(Debug, Clone)]
pub(super) struct Server {
    authority: String,
    prefix: String,
    api_key: Option<String>,
}

/// An answer that is being streamed. Dropping it cancels the request.
#[derive(Debug)]
pub(super) struct Answer {
    body: Incoming,
    parser: EventParser,
    pending: std::vec::IntoIter<Delta>,
    // Drives the connection; ends when this is dropped.
    _connection: JoinSet<()>,
}

impl Server {
    /// The server at `url`, with or without `/v1` at its end.
    pub(super) fn new(url: &str, api_key: Option<String>) -> Result<Self> {
        let uri: Uri = url.parse().with_context(|| format!("`{url}` is no URL"))?;
        ensure!(
            uri.scheme_str() == Some("http"),
            "`{url}` is not reachable: this client speaks plain http:// only"
        );
        let authority = uri.authority().context("the URL names no host")?;
        let port = authority.port_u16().unwrap_or(80);
        let path = uri.path().trim_end_matches('/');
        let prefix = path.strip_suffix("/v1").unwrap_or(path);
        Ok(Self {
            authority: format!("{}:{port}", authority.host()),
            prefix: prefix.to_owned(),
            api_key,
        })
    }

    /// Id of the first model the server lists.
    pub(super) async fn first_model(&self) -> Result<String> {
        let (response, _connection) = self.send(Method::GET, "/v1/models", None).await?;
        let list = read_json(response).await?;
        let id = list["data"][0]["id"].as_str().context("the server lists no model")?;
        Ok(id.to_owned())
    }

    /// Sends a chat request; `body` asks for a stream.
    pub(super) async fn complete(&self, body: &Value) -> Result<Answer> {
        let (response, connection) =
            self.send(Method::POST, "/v1/chat/completions", Some(body)).await?;
        if !response.status().is_success() {
            let status = response.status();
            let error = read_json(response).await?;
            bail!("{} ({status})", error["error"]["message"].as_str().unwrap_or("refused"));
        }
        Ok(Answer {
            body: response.into_body(),
            parser: EventParser::default(),
            pending: Vec::new().into_iter(),
            _connection: connection,
        })
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<(Response<Incoming>, JoinSet<()>)> {
        let cannot_reach = || format!("cannot reach a server at http://{}", self.authority);
        let socket = TcpStream::connect(&self.authority).await.with_context(cannot_reach)?;
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(socket)).await.with_context(cannot_reach)?;
        let mut driver = JoinSet::new();
        driver.spawn(async move {
            // What goes wrong here also ends the response, where it is reported.
            let _ = connection.await;
        });
        let mut request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.prefix))
            .header(HOST, &self.authority)
            .header(CONTENT_TYPE, "application/json");
        if let Some(key) = &self.api_key {
            request = request.header(AUTHORIZATION, format!("Bearer {key}"));
        }
        let body = body.map(Value::to_string).unwrap_or_default();
        let request = request.body(Full::new(Bytes::from(body))).context("building a request")?;
        let response = sender.send_request(request).await.with_context(cannot_reach)?;
        Ok((response, driver))
    }
}

impl Answer {
    /// The next piece; `None` at the end of the stream.
    pub(super) async fn next(&mut self) -> Result<Option<Delta>> {
        loop {
            if let Some(delta) = self.pending.next() {
                return Ok(Some(delta));
            }
            let Some(frame) = self.body.frame().await else { return Ok(None) };
            let frame = frame.context("the server closed the stream early")?;
            if let Ok(bytes) = frame.into_data() {
                self.pending = self.parser.push(&bytes)?.into_iter();
            }
        }
    }
}

async fn read_json(response: Response<Incoming>) -> Result<Value> {
    let body = response.into_body().collect().await.context("reading the response")?;
    serde_json::from_slice(&body.to_bytes()).context("the server's response is no JSON")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_may_name_the_api_version_or_not() {
        for (url, authority, prefix) in [
            ("http://host", "host:80", ""),
            ("http://host:8000/v1", "host:8000", ""),
            ("http://[::1]:9/llm/v1/", "[::1]:9", "/llm"),
        ] {
            let server = Server::new(url, None).unwrap();
            assert_eq!((server.authority.as_str(), server.prefix.as_str()), (authority, prefix));
        }
        assert!(Server::new("https://host", None).is_err());
        assert!(Server::new("host", None).is_err());
    }
}
