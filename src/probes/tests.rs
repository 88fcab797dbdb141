use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use super::*;

/// A listener whose loop answers these reasons for not being ready.
fn start(reasons: &'static [&'static str]) -> (Listener, JoinSet<()>) {
    let (listener, mut seat) = Listener::start("127.0.0.1:0").unwrap();
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        while let Some(question) = seat.questions.recv().await {
            match question {
                Question::Turn => seat.turned(),
                Question::Ready(answer) => {
                    drop(answer.send(reasons.iter().map(|reason| (*reason).to_owned()).collect()));
                }
                Question::Figures(answer) => {
                    drop(
                        answer
                            .send(Box::new(Figures { node: "celery@box".to_owned(), ..Figures::default() })),
                    );
                }
            }
        }
    });
    (listener, tasks)
}

/// What a server says to these bytes until it closes the connection.
async fn say(address: SocketAddr, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    // It may have had enough of it before the end.
    let _ = stream.write_all(bytes).await;
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    String::from_utf8(answer).unwrap()
}

async fn get(address: SocketAddr, path: &str) -> String {
    say(address, format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes()).await
}

#[tokio::test]
async fn a_worker_that_is_ready_says_so_on_every_page() {
    let (listener, _tasks) = start(&[]);
    for (path, says) in [
        ("/livez", "ok\n"),
        ("/readyz?verbose", "ready\n"),
        ("/metrics", "celery_worker_up{hostname=\"box\"} 1.0"),
    ] {
        let answer = get(listener.address, path).await;
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.contains(says), "{answer}");
        assert!(answer.contains("connection: close\r\n"), "{answer}");
    }
}

#[tokio::test]
async fn a_worker_that_is_not_ready_says_why_and_lives() {
    let (listener, _tasks) = start(&["not connected", "no child is up"]);
    let answer = get(listener.address, "/readyz").await;
    assert!(
        answer.starts_with("HTTP/1.1 503 ") && answer.ends_with("\r\n\r\nnot connected\nno child is up\n"),
        "{answer}"
    );
    assert!(get(listener.address, "/livez").await.starts_with("HTTP/1.1 200 "));
}

#[tokio::test]
async fn a_worker_whose_loop_is_over_is_stopping() {
    let (listener, mut tasks) = start(&[]);
    tasks.shutdown().await;
    for path in ["/readyz", "/metrics"] {
        let answer = get(listener.address, path).await;
        assert!(
            answer.starts_with("HTTP/1.1 503 ") && answer.ends_with("the worker is stopping\n"),
            "{answer}"
        );
    }
    assert!(get(listener.address, "/livez").await.starts_with("HTTP/1.1 200 "));
}

#[tokio::test]
async fn other_paths_methods_and_nonsense_are_refused_as_http_says() {
    let (listener, _tasks) = start(&[]);
    let huge = format!("GET /livez HTTP/1.1\r\nX: {}\r\n\r\n", "a".repeat(100_000));
    let many = format!("GET /livez HTTP/1.1\r\n{}\r\n", "X: y\r\n".repeat(1000));
    for (request, status) in [
        ("GET / HTTP/1.1\r\n\r\n", "404"),
        ("GET /livez/ HTTP/1.0\r\n\r\n", "404"),
        ("POST /livez HTTP/1.1\r\nContent-Length: 2\r\n\r\nok", "405"),
        ("DELETE /nothing HTTP/1.1\r\n\r\n", "404"),
        ("how are you?\r\n\r\n", "400"),
        ("GET /livez HTTP/9.9\r\n\r\n", "400"),
        (huge.as_str(), "431"),
        (many.as_str(), "431"),
    ] {
        let answer = say(listener.address, request.as_bytes()).await;
        let shown: String = request.chars().take(40).collect();
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status} "))
                || answer.starts_with(&format!("HTTP/1.0 {status} ")),
            "{shown}: {answer}"
        );
        if status == "405" {
            assert!(answer.contains("allow: GET, HEAD\r\n"), "{answer}");
        }
    }
}

#[tokio::test]
async fn head_is_get_without_the_body() {
    let (listener, _tasks) = start(&[]);
    let answer = say(listener.address, b"HEAD /livez HTTP/1.1\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 200 ") && answer.ends_with("\r\n\r\n"), "{answer}");
    assert!(answer.contains("content-length: 3\r\n"), "{answer}");
}

#[tokio::test]
async fn metrics_are_called_what_the_scraper_asks_for() {
    let (listener, _tasks) = start(&[]);
    let request =
        "GET /metrics HTTP/1.1\r\nAccept: application/openmetrics-text;version=1.0.0,text/plain\r\n\r\n";
    let answer = say(listener.address, request.as_bytes()).await;
    assert!(answer.contains("content-type: application/openmetrics-text; version=1.0.0"), "{answer}");
    let answer = get(listener.address, "/metrics").await;
    assert!(answer.contains("content-type: text/plain; version=0.0.4"), "{answer}");
}

#[tokio::test]
async fn clients_that_say_nothing_keep_no_probe_out() {
    let (listener, _tasks) = start(&[]);
    let mut silent = Vec::new();
    for number in 0..200 {
        let mut stream = TcpStream::connect(listener.address).await.unwrap();
        if number % 2 == 0 {
            stream.write_all(b"GET /livez HTTP/1.1\r\nX-Slow: ").await.unwrap();
        }
        silent.push(stream);
    }
    assert!(get(listener.address, "/livez").await.starts_with("HTTP/1.1 200 "));
    // The oldest gave way, long before its time was up.
    let mut rest = Vec::new();
    let _ = silent[0].read_to_end(&mut rest).await;
    assert!(rest.is_empty(), "{rest:?}");
}

#[tokio::test]
async fn many_requests_at_the_same_time_are_all_answered() {
    let (listener, _tasks) = start(&[]);
    let address = listener.address;
    let mut asking = JoinSet::new();
    for _ in 0..40 {
        asking.spawn(async move { get(address, "/livez").await });
    }
    while let Some(answer) = asking.join_next().await {
        assert!(answer.unwrap().starts_with("HTTP/1.1 200 "));
    }
}

#[tokio::test]
async fn a_port_in_use_is_a_wrong_option_and_a_dropped_listener_frees_its_port() {
    let (listener, _seat) = Listener::start("127.0.0.1:0").unwrap();
    let address = listener.address.to_string();
    let error = Listener::start(&address).err().unwrap();
    assert_eq!(error.exit_code(), 2);
    let text = error.to_string();
    assert!(
        text.starts_with(&format!("--http {address}: cannot listen there: Address already in use")),
        "{text}"
    );
    drop(listener);
    assert!(Listener::start(&address).is_ok());
}

#[test]
fn an_address_is_a_host_and_a_port_or_a_port_alone() {
    for (text, host, port) in [
        (":9000", "", 9000),
        ("localhost:0", "localhost", 0),
        ("127.0.0.1:80", "127.0.0.1", 80),
        ("[::1]:80", "::1", 80),
    ] {
        assert_eq!(parse_address(text), Ok((host.to_owned(), port)));
    }
    for text in ["", "9000", "localhost", "localhost:", "localhost:99999", "::1:80", "http://x:80", "[::1:80"]
    {
        assert_eq!(parse_address(text), Err(format!("'{text}' is not host:port or :port")));
    }
}

/// A loop that turned last so long after its birth, and a moment as long after it.
fn probe(turned: u64) -> (Probe, mpsc::Receiver<Question>, Instant) {
    let born = Instant::now();
    let pulse = Arc::new(Pulse { born, turned: AtomicU64::new(turned), over: AtomicBool::new(false) });
    let (questions, inbox) = mpsc::channel(1);
    (Probe { pulse, questions, asked: AtomicU64::new(0) }, inbox, born)
}

#[test]
fn a_loop_that_does_not_turn_when_it_is_asked_to_is_taken_for_dead_by_a_later_probe() {
    let (probe, mut questions, born) = probe(0);
    let at = |seconds: u64| born + Duration::from_secs(seconds);
    assert_eq!(probe.life(at(60)), Life::Turning);
    assert!(matches!(questions.try_recv(), Ok(Question::Turn)));
    assert_eq!(probe.life(at(69)), Life::Turning);
    assert!(questions.try_recv().is_err(), "once is enough");
    assert_eq!(probe.life(at(70)), Life::Hung(Duration::from_secs(70)));
    probe.pulse.turned.store(70_500_000, Ordering::Relaxed);
    assert_eq!(probe.life(at(71)), Life::Turning);
}

#[test]
fn a_loop_that_sleeps_and_turns_when_it_is_asked_to_lives_for_ever() {
    let (probe, mut questions, born) = probe(0);
    for seconds in (60..6000).step_by(60) {
        assert_eq!(probe.life(born + Duration::from_secs(seconds)), Life::Turning);
        assert!(matches!(questions.try_recv(), Ok(Question::Turn)), "asked each time");
        // In the same instant, as near as it can be told.
        probe.pulse.turned.store(seconds * 1_000_000, Ordering::Relaxed);
    }
}

#[test]
fn a_worker_on_its_way_out_lives_until_its_process_ends() {
    let (probe, _questions, born) = probe(0);
    probe.pulse.over.store(true, Ordering::Relaxed);
    for seconds in [60, 600] {
        assert_eq!(probe.life(born + Duration::from_secs(seconds)), Life::Turning);
    }
}
