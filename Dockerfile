# A builder without BuildKit builds every stage before the one asked for. So the proxy comes before the
# tests, which take minutes to compile; it is the default all the same.
FROM golang:1.26-bookworm AS source
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY . .

FROM source AS build
ARG VERSION=dev
RUN make build

FROM scratch AS proxy
COPY --from=source /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/
COPY --from=build /src/redis_proxy /
USER 65532:65532
ENV RP_LISTEN_ADDRESS=0.0.0.0
EXPOSE 8080
HEALTHCHECK --interval=5s --timeout=3s CMD ["/redis_proxy", "--check"]
ENTRYPOINT ["/redis_proxy"]

FROM source AS race
RUN go test -race -c -o redis_proxy.test .

FROM redis:7-bookworm AS test
COPY --from=race /src /src
WORKDIR /src
USER redis
ENTRYPOINT ["./redis_proxy.test"]
CMD ["-test.timeout=10m", "-test.parallel=4"]

FROM proxy
