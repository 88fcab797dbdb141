//! The stream under a connection: TCP, TLS with py-amqp's options, and a switch that ends it.
//!
//! lapin would open the socket itself; it is given ours instead, since it offers neither a bound on connecting
//! nor TLS without verification, hides what the server says of itself, and ends its thread only when the
//! socket ends: a peer that is silent without being gone would keep the thread of every lost connection.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use async_rs::Tokio;
use async_rs::traits::{Executor, Reactor, RuntimeKit};
use async_rs::util::Task;
use futures_io::{AsyncRead, AsyncWrite};
use futures_util::Stream;
use lapin::types::FieldTable;
use tokio::io::{AsyncRead as TokioRead, AsyncWrite as TokioWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use super::address::Address;
use super::frames::Frames;
use super::tls;

/// Data that the peer does not acknowledge for so long ends the connection, heartbeats or not.
const UNACKNOWLEDGED: Duration = Duration::from_secs(30);
/// py-amqp's keepalive: the first probe after, then every, and so many.
const KEEP_IDLE: Duration = Duration::from_secs(60);
const KEEP_INTERVAL: Duration = Duration::from_secs(10);
const KEEP_COUNT: u32 = 9;
/// Read at once from the socket.
const READ: usize = 64 << 10;

/// A byte stream of tokio's.
trait Bytes: TokioRead + TokioWrite + Send + Unpin {}
impl<T: TokioRead + TokioWrite + Send + Unpin> Bytes for T {}

/// What the server said of itself when it greeted.
pub(super) type Greeting = Arc<OnceLock<FieldTable>>;

/// The stream that lapin reads and writes, on its own thread.
pub(super) struct Wire {
    bytes: Box<dyn Bytes>,
    cut: Pin<Box<WaitForCancellationFutureOwned>>,
    frames: Frames,
    read: Box<[u8]>,
    /// What may be handed out, from `handed` on.
    ready: Vec<u8>,
    handed: usize,
    greeting: Greeting,
}

impl Wire {
    /// Connects. The wire ends when `cut` is cancelled.
    pub(super) async fn dial(address: &Address, cut: CancellationToken) -> io::Result<(Self, Greeting)> {
        let socket = TcpStream::connect((address.host.as_str(), address.port)).await?;
        tune(&socket)?;
        let bytes: Box<dyn Bytes> = match &address.tls {
            Some(options) => Box::new(tls::connect(socket, &address.host, options).await?),
            None => Box::new(socket),
        };
        let greeting = Greeting::default();
        let wire = Self {
            bytes,
            cut: Box::pin(cut.cancelled_owned()),
            frames: Frames::default(),
            read: vec![0; READ].into_boxed_slice(),
            ready: Vec::new(),
            handed: 0,
            greeting: greeting.clone(),
        };
        Ok((wire, greeting))
    }

    fn ended(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        match self.cut.as_mut().poll(context) {
            Poll::Ready(()) => Err(io::Error::new(io::ErrorKind::ConnectionAborted, "the session has ended")),
            Poll::Pending => Ok(()),
        }
    }
}

fn tune(socket: &TcpStream) -> io::Result<()> {
    use rustix::net::sockopt;
    socket.set_nodelay(true)?;
    sockopt::set_socket_keepalive(socket, true)?;
    // Not every system has these; without them a dead peer is noticed later.
    let _ = sockopt::set_tcp_keepidle(socket, KEEP_IDLE);
    let _ = sockopt::set_tcp_keepintvl(socket, KEEP_INTERVAL);
    let _ = sockopt::set_tcp_keepcnt(socket, KEEP_COUNT);
    #[cfg(target_os = "linux")]
    let _ =
        sockopt::set_tcp_user_timeout(socket, u32::try_from(UNACKNOWLEDGED.as_millis()).unwrap_or(u32::MAX));
    Ok(())
}

impl AsyncRead for Wire {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, out: &mut [u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        while this.handed == this.ready.len() {
            this.ended(context)?;
            this.ready.clear();
            this.handed = 0;
            let mut read = ReadBuf::new(&mut this.read);
            ready!(Pin::new(&mut this.bytes).poll_read(context, &mut read))?;
            if read.filled().is_empty() {
                return Poll::Ready(Ok(0));
            }
            match this.frames.feed(read.filled(), &mut this.ready) {
                Ok(None) => {}
                Ok(Some(greeting)) => {
                    // Class, method, two octets of version, then the table.
                    let table = greeting.get(6..).map(lapin::types::parsing::parse_field_table);
                    if let Some(Ok((_, table))) = table {
                        // Set once: the first frame comes once.
                        let _ = this.greeting.set(table);
                    }
                }
                Err(reason) => return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, reason))),
            }
        }
        let count = out.len().min(this.ready.len() - this.handed);
        out[..count].copy_from_slice(&this.ready[this.handed..this.handed + count]);
        this.handed += count;
        Poll::Ready(Ok(count))
    }
}

impl AsyncWrite for Wire {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        this.ended(context)?;
        Pin::new(&mut this.bytes).poll_write(context, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().bytes).poll_flush(context)
    }

    fn poll_close(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.ended(context).is_err() {
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut this.bytes).poll_shutdown(context)
    }
}

/// tokio as lapin wants to see it, with [`Wire`] for a stream.
#[derive(Clone, Debug)]
pub(super) struct Kit(Tokio);

impl Kit {
    /// The runtime that we are on.
    pub(super) fn current() -> Self {
        Self(Tokio::current())
    }
}

impl RuntimeKit for Kit {}

impl Executor for Kit {
    type Task<T: Send + 'static> = <Tokio as Executor>::Task<T>;

    fn block_on<T, F: Future<Output = T>>(&self, future: F) -> T {
        self.0.block_on(future)
    }

    fn spawn<T: Send + 'static, F: Future<Output = T> + Send + 'static>(
        &self,
        future: F,
    ) -> Task<Self::Task<T>> {
        self.0.spawn(future)
    }

    fn spawn_blocking<T: Send + 'static, F: FnOnce() -> T + Send + 'static>(
        &self,
        work: F,
    ) -> Task<Self::Task<T>> {
        self.0.spawn_blocking(work)
    }
}

impl Reactor for Kit {
    type TcpStream = Wire;
    type Sleep = <Tokio as Reactor>::Sleep;

    fn register<H: io::Read + io::Write + Send + 'static>(
        &self,
        _: H,
    ) -> io::Result<impl AsyncRead + AsyncWrite + Send + Unpin + 'static> {
        // As below.
        Err::<Wire, _>(io::Error::from(io::ErrorKind::Unsupported))
    }

    fn sleep(&self, duration: Duration) -> Self::Sleep {
        self.0.sleep(duration)
    }

    fn interval(&self, duration: Duration) -> impl Stream<Item = std::time::Instant> + Send + 'static {
        self.0.interval(duration)
    }

    fn tcp_connect_addr(&self, _: SocketAddr) -> impl Future<Output = io::Result<Wire>> + Send + 'static {
        // lapin asks the connector that it is given, which has dialled already.
        std::future::ready(Err(io::Error::from(io::ErrorKind::Unsupported)))
    }
}
