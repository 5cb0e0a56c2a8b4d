// Serves a folder on localhost: for `make serve`, and for the test, which puts it under a path of its own.
import { createReadStream, statSync } from "node:fs";
import { createServer } from "node:http";
import { extname, join, normalize, sep } from "node:path";
import { fileURLToPath } from "node:url";

const TYPES = {
  ".css": "text/css",
  ".html": "text/html; charset=utf-8",
  ".js": "text/javascript",
  ".json": "application/json",
  ".svg": "image/svg+xml",
  ".wasm": "application/wasm",
};

/** Resolves to the server and the address of the folder. Port 0 takes a free one. */
export function serve(folder, { port = 0, path = "/" } = {}) {
  const server = createServer((request, response) => {
    const refuse = (status) => response.writeHead(status, { "content-type": "text/plain" }).end(`${status}\n`);
    let asked;
    try {
      asked = decodeURIComponent(new URL(request.url, "http://localhost").pathname);
    } catch {
      return refuse(400);
    }
    if (request.method !== "GET" && request.method !== "HEAD") return refuse(405);
    if (!asked.startsWith(path) || asked.includes("\0")) return refuse(404);
    const inside = normalize(asked.slice(path.length) || "index.html");
    if (inside.split(sep).includes("..")) return refuse(404);
    const file = join(folder, inside.endsWith(sep) ? `${inside}index.html` : inside);
    const size = statSync(file, { throwIfNoEntry: false });
    if (size === undefined || !size.isFile()) return refuse(404);
    response.writeHead(200, {
      "content-type": TYPES[extname(file)] ?? "application/octet-stream",
      "content-length": size.size,
      "cache-control": "no-cache",
    });
    if (request.method === "HEAD") return response.end();
    createReadStream(file)
      .on("error", () => response.destroy())
      .pipe(response);
  });
  return new Promise((resolve, reject) => {
    server.once("error", reject);
    server.listen(port, "127.0.0.1", () =>
      resolve({ server, address: `http://localhost:${server.address().port}${path}` }),
    );
  });
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const folder = fileURLToPath(new URL("dist", import.meta.url));
  if (statSync(join(folder, "index.html"), { throwIfNoEntry: false }) === undefined) {
    console.error("web/dist is not there: `make web` builds it.");
    process.exit(1);
  }
  const wanted = Number(process.env.PORT ?? 8080);
  // Somebody else may have the usual port; a free one does as well.
  const { address } = await serve(folder, { port: wanted }).catch(() => serve(folder));
  console.log(`The page is at ${address} (Ctrl-C ends it).`);
}
