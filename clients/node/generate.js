// Streams one answer from a zllm server:
//
//     npm install
//     node generate.js "What is 12 + 7?" [TARGET]
//
// ZLLM_API_KEY is sent where it is set, and ZLLM_TLS_CA names the CA where the server has TLS.

import fs from "node:fs";
import path from "node:path";
import { fileURLToPath } from "node:url";

import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

const [question, target = "127.0.0.1:50051"] = process.argv.slice(2);
if (!question) {
  console.error('usage: node generate.js "QUESTION" [TARGET]');
  process.exit(2);
}

const here = path.dirname(fileURLToPath(import.meta.url));
const protos = process.env.ZLLM_PROTOS ?? path.join(here, "../../protos");
const definition = protoLoader.loadSync("zllm/v1/generation.proto", {
  includeDirs: [protos],
  keepCase: true,
  defaults: true, // a delta may have no text
  enums: String,
  oneofs: true, // delta, started or finished is named by `event`
});
const { zllm } = grpc.loadPackageDefinition(definition);

const ca = process.env.ZLLM_TLS_CA;
const client = new zllm.v1.GenerationService(
  target,
  ca ? grpc.credentials.createSsl(fs.readFileSync(ca)) : grpc.credentials.createInsecure(),
);
const metadata = new grpc.Metadata();
if (process.env.ZLLM_API_KEY) {
  metadata.set("authorization", `Bearer ${process.env.ZLLM_API_KEY}`);
}

const call = client.StreamGenerate(
  {
    chat: { messages: [{ role: "user", content: question }] },
    sampling: { temperature: 0 },
    stopping: { max_tokens: 200 },
  },
  metadata,
);
call.on("data", (message) => {
  if (message.event === "delta") {
    process.stdout.write(message.delta.text);
  } else if (message.event === "finished") {
    const { prompt_tokens, completion_tokens } = message.finished.usage;
    process.stdout.write(`\n[${prompt_tokens} + ${completion_tokens} tokens]\n`);
  }
});
call.on("error", (error) => {
  console.error(`${grpc.status[error.code]}: ${error.details}`);
  process.exitCode = 1;
});
