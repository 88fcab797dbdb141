//! The HTTP of the listener: three pages, read only. One request a connection; each has little time and little room,
//! and when there are too many the oldest gives way, so that nobody can keep a probe out by holding connections open.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ACCEPT, ALLOW, CACHE_CONTROL, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{AbortHandle, JoinSet};

use super::{Life, Probe, Question};
use crate::metrics;

/// Connections at a time; a scraper and some probes need a handful.
const MOST_CONNECTIONS: usize = 64;
/// The headers of a request must be there by then.
const HEADERS_WITHIN: Duration = Duration::from_secs(5);
/// The whole of a connection.
const CONNECTION_WITHIN: Duration = Duration::from_secs(15);
/// Room for request line and headers; the smallest that hyper takes.
const MOST_HEAD: usize = 8192;
const MOST_HEADERS: usize = 64;
/// After an error of the listening socket, which is out of descriptors most likely.
const BREATH: Duration = Duration::from_millis(100);

const PLAIN: &str = "text/plain; charset=utf-8";
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
const PROMETHEUS: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Serves until it is dropped.
pub(super) async fn serve(socket: std::net::TcpListener, probe: Arc<Probe>) {
    let listener = match TcpListener::from_std(socket) {
        Ok(listener) => listener,
        Err(error) => {
            tracing::error!(target: "celery.worker", %error, "Probes and metrics cannot be served.");
            return;
        }
    };
    let mut connections = JoinSet::new();
    let mut oldest: VecDeque<AbortHandle> = VecDeque::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    if oldest.len() >= MOST_CONNECTIONS && let Some(given_up) = oldest.pop_front() {
                        given_up.abort();
                    }
                    oldest.push_back(connections.spawn(connection(stream, Arc::clone(&probe))));
                }
                Err(_) => tokio::time::sleep(BREATH).await,
            },
            Some(_) = connections.join_next() => oldest.retain(|one| !one.is_finished()),
        }
    }
}

async fn connection(stream: TcpStream, probe: Arc<Probe>) {
    let _ = stream.set_nodelay(true);
    let service = service_fn(move |request: Request<Incoming>| {
        let probe = Arc::clone(&probe);
        async move { Ok::<_, Infallible>(answer(&probe, &request).await) }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADERS_WITHIN)
        .max_buf_size(MOST_HEAD)
        .max_headers(MOST_HEADERS)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    // Whatever went wrong is the client's.
    let _ = tokio::time::timeout(CONNECTION_WITHIN, served).await;
}

async fn answer(probe: &Probe, request: &Request<Incoming>) -> Response<Full<Bytes>> {
    let path = request.uri().path();
    if !matches!(path, "/livez" | "/readyz" | "/metrics") {
        return page(StatusCode::NOT_FOUND, PLAIN, "There are /livez, /readyz and /metrics.\n".to_owned());
    }
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        let mut refused = page(StatusCode::METHOD_NOT_ALLOWED, PLAIN, "GET and HEAD only.\n".to_owned());
        refused.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return refused;
    }
    let unavailable = |why: String| page(StatusCode::SERVICE_UNAVAILABLE, PLAIN, why + "\n");
    match path {
        "/livez" => match probe.life(Instant::now()) {
            Life::Turning => page(StatusCode::OK, PLAIN, "ok\n".to_owned()),
            Life::Hung(silence) => {
                unavailable(format!("the worker's loop has not turned for {:.0} s", silence.as_secs_f64()))
            }
        },
        "/readyz" => match probe.ask(Question::Ready).await {
            Ok(reasons) if reasons.is_empty() => page(StatusCode::OK, PLAIN, "ready\n".to_owned()),
            Ok(reasons) => unavailable(reasons.join("\n")),
            Err(why) => unavailable(why.to_owned()),
        },
        _ => match probe.ask(Question::Figures).await {
            Ok(figures) => page(StatusCode::OK, content_type(request), metrics::render(*figures)),
            Err(why) => unavailable(why.to_owned()),
        },
    }
}

/// The text is OpenMetrics, which whoever knows only the older format reads as well, where it is called by its name.
fn content_type(request: &Request<Incoming>) -> &'static str {
    let accepts = request.headers().get_all(ACCEPT).iter().filter_map(|value| value.to_str().ok());
    let open = accepts.into_iter().any(|value| value.contains("application/openmetrics-text"));
    if open { OPEN_METRICS } else { PROMETHEUS }
}

fn page(status: StatusCode, content_type: &'static str, text: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}
