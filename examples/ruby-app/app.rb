# An application that uses the service, with Ruby's standard library alone: embeds a text every few
# seconds until it is told to stop.
#
#   EMBEDDER_URL=http://localhost:5001 VECTOR_EMBEDDER_API_KEY=… ruby app.rb

require "io/wait"
require "json"
require "net/http"
require "uri"

URL = ENV.fetch("EMBEDDER_URL", "http://localhost:5001")
KEY = ENV.fetch("VECTOR_EMBEDDER_API_KEY", "abc123")
INTERVAL = Float(ENV.fetch("INTERVAL", "5")) # seconds between texts
START_TIMEOUT = 240 # seconds the model may take to load
ATTEMPTS = 5
OFFLINE = [SystemCallError, SocketError, EOFError, Net::OpenTimeout, Net::ReadTimeout].freeze

TEXTS = [
  "What is deep learning?",
  "A kitten plays with a ball of wool.",
  "Die Straßenbahn fährt heute nur bis zum Hauptbahnhof.",
  "The invoice is due within thirty days.",
].freeze

class Failed < StandardError; end

# A signal may come at any moment: it leaves a byte, which every wait looks for.
$stopped, signals = IO.pipe
%w[INT TERM].each { |name| trap(name) { signals.write_nonblock(".", exception: false) } }
$stdout.sync = true

# Waits so many seconds, or until a signal comes; true when it came.
def stopped_within?(seconds)
  !$stopped.wait_readable(seconds).nil?
end

# Sends one request. Returns Net::HTTPResponse; raises one of OFFLINE when there is no answer.
def send_request(request)
  uri = URI(URL)
  Net::HTTP.start(uri.host, uri.port, use_ssl: uri.scheme == "https", read_timeout: 65) do |http|
    http.request(request)
  end
end

# Waits until the model is loaded and answers correctly. False when a signal came first; raises
# Failed after START_TIMEOUT.
def wait_until_ready
  deadline = Process.clock_gettime(Process::CLOCK_MONOTONIC) + START_TIMEOUT
  loop do
    begin
      response = send_request(Net::HTTP::Get.new("/health/ready"))
      if response.is_a?(Net::HTTPOK)
        puts "ready: #{JSON.parse(response.body)["model"]} at #{URL}"
        return true
      end
      state = "answers #{response.code}"
    rescue *OFFLINE => e
      state = e.message
    end
    if Process.clock_gettime(Process::CLOCK_MONOTONIC) > deadline
      raise Failed, "#{URL} is not ready after #{START_TIMEOUT} s: #{state}"
    end
    puts "waiting for #{URL}: #{state}"
    return false if stopped_within?(1)
  end
end

# Returns the text's vector, an array of floats, or nil when a signal came between two attempts.
# Busy (429), not ready (503) and unreachable are tried again, after as long as the service says;
# every other answer is final and raises Failed.
def embed(text)
  headers = { "X-API-Key" => KEY, "Content-Type" => "application/json" }
  attempt = 0
  loop do
    attempt += 1
    wait = 2**(attempt - 1)
    begin
      request = Net::HTTP::Post.new("/embeddings", headers)
      request.body = JSON.generate(text: text)
      response = send_request(request)
      return JSON.parse(response.body)["embeddings"][0] if response.is_a?(Net::HTTPOK)

      problem = "#{response.code} #{response.body.strip}"
      raise Failed, problem unless %w[429 503].include?(response.code)

      wait = Integer(response["Retry-After"]) if response["Retry-After"]
    rescue *OFFLINE => e
      problem = e.message
    end
    raise Failed, "#{problem} (#{attempt} attempts)" if attempt == ATTEMPTS

    puts "again in #{wait} s: #{problem}"
    return nil if stopped_within?(wait)
  end
end

def run
  return unless wait_until_ready

  TEXTS.cycle do |text|
    started = Process.clock_gettime(Process::CLOCK_MONOTONIC)
    vector = embed(text) or break
    milliseconds = (Process.clock_gettime(Process::CLOCK_MONOTONIC) - started) * 1000
    first = vector.first(4).map { |value| format("%.4f", value) }.join(", ")
    puts format('"%s": %d dimensions [%s, …] in %.1f ms', text, vector.size, first, milliseconds)
    break if stopped_within?(INTERVAL)
  end
end

begin
  run
  puts "stopped"
rescue Failed => e
  abort "cannot go on: #{e.message}"
end
