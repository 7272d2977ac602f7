// What a client in another language does, with the .proto alone; run by test_other_languages.py.
// Arguments: the server's address, the folder above protos/, a model, its inputs as JSON.
// Prints JSON.

import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

const [address, root, model, samples] = process.argv.slice(2);
const rows = JSON.parse(samples);
const width = rows[0].length;

const options = { keepCase: true, longs: String, enums: String, arrays: true, includeDirs: [root] };
const credentials = grpc.credentials.createInsecure();
const protocol = grpc.loadPackageDefinition(
  protoLoader.loadSync("protos/inference.proto", options),
);
const client = new protocol.inference.GRPCInferenceService(address, credentials);

// grpc.health.v1, as its .proto has it.
const health = grpc.loadPackageDefinition(
  protoLoader.fromJSON({
    nested: {
      grpc: {
        nested: {
          health: {
            nested: {
              v1: {
                nested: {
                  HealthCheckRequest: { fields: { service: { type: "string", id: 1 } } },
                  HealthCheckResponse: {
                    fields: { status: { type: "ServingStatus", id: 1 } },
                    nested: {
                      ServingStatus: {
                        values: { UNKNOWN: 0, SERVING: 1, NOT_SERVING: 2, SERVICE_UNKNOWN: 3 },
                      },
                    },
                  },
                  Health: {
                    methods: {
                      Check: {
                        requestType: "HealthCheckRequest",
                        responseType: "HealthCheckResponse",
                      },
                    },
                  },
                },
              },
            },
          },
        },
      },
    },
  }, { enums: String }),
);
const healthClient = new health.grpc.health.v1.Health(address, credentials);

function call(client, method, request, deadline = Date.now() + 60_000) {
  return new Promise((resolve, reject) =>
    client[method](request, { deadline }, (error, answer) =>
      error ? reject(error) : resolve(answer),
    ),
  );
}

async function refusal(promise) {
  try {
    await promise;
  } catch (error) {
    return [grpc.status[error.code], error.details];
  }
  return ["OK", ""];
}

function request(x, { raw = true, id = "", columns = width } = {}) {
  const values = x.flat();
  const tensor = { name: "input", datatype: "FP32", shape: [x.length, columns] };
  if (!raw) tensor.contents = { fp32_contents: values };
  return {
    model_name: model,
    id,
    inputs: [tensor],
    raw_input_contents: raw ? [Buffer.from(new Float32Array(values).buffer)] : [],
  };
}

function output(answer) {
  const [tensor] = answer.outputs;
  const [raw] = answer.raw_output_contents;
  const values = raw
    ? [...new Float32Array(Uint8Array.from(raw).buffer)]
    : tensor.contents.fp32_contents;
  const columns = Number(tensor.shape[1]);
  return Array.from({ length: Number(tensor.shape[0]) }, (_, row) =>
    values.slice(row * columns, (row + 1) * columns),
  );
}

function stream() {
  return new Promise((resolve, reject) => {
    const found = [];
    const open = client.ModelStreamInfer({ deadline: Date.now() + 60_000 });
    open.on("data", ({ error_message: error, infer_response: answer }) =>
      found.push(error || [answer.id, output(answer)]),
    );
    open.on("error", reject);
    open.on("end", () => resolve(found));
    rows.forEach((row, number) => open.write(request([row], { id: String(number) })));
    open.write(request(rows, { columns: width + 1 }));
    open.end();
  });
}

const said = {
  health: (await call(healthClient, "Check", { service: "" })).status,
  live: (await call(client, "ServerLive", {})).live,
  model_ready: (await call(client, "ModelReady", { name: model })).ready,
  metadata: await call(client, "ModelMetadata", { name: model }),
  raw: output(await call(client, "ModelInfer", request(rows))),
  typed: output(await call(client, "ModelInfer", request(rows, { raw: false }))),
  stream: await stream(),
  deadline: await refusal(call(client, "ModelInfer", request(rows), Date.now() - 1)),
  wrong_width: await refusal(call(client, "ModelInfer", request(rows, { columns: width + 1 }))),
  statistics: await refusal(call(client, "ModelStatistics", { name: "nope" })),
};
console.log(JSON.stringify(said));
