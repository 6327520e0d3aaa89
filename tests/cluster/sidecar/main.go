// sidecar does the work of node-driver-registrar, or with --health-port that of livenessprobe, with the same
// options: it tells kubelet of a CSI plugin, or answers whether the plugin is well. The real ones come as images
// from a registry, which the tests do without.
package main

import (
	"context"
	"flag"
	"log"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"time"

	csi "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	registration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"
)

var (
	address  = flag.String("csi-address", "/run/csi/socket", "the plugin's socket, as it is seen here")
	endpoint = flag.String("kubelet-registration-path", "", "the plugin's socket, as kubelet sees it")
	health   = flag.Int("health-port", 0, "answer /healthz on this port, in place of registering")
	patience = flag.Duration("probe-timeout", time.Second, "how long a probe may take")
	folder   = flag.String("plugin-registration-path", "/registration", "where kubelet looks for plugins")
)

type server struct {
	registration.UnimplementedRegistrationServer
	driver string
}

func (s server) GetInfo(context.Context, *registration.InfoRequest) (*registration.PluginInfo, error) {
	return &registration.PluginInfo{
		Type:              registration.CSIPlugin,
		Name:              s.driver,
		Endpoint:          *endpoint,
		SupportedVersions: []string{"1.0.0"},
	}, nil
}

func (s server) NotifyRegistrationStatus(
	_ context.Context, status *registration.RegistrationStatus,
) (*registration.RegistrationStatusResponse, error) {
	if !status.PluginRegistered {
		// Whoever runs this starts it again, and kubelet asks anew.
		log.Fatalf("kubelet did not register %s: %s", s.driver, status.Error)
	}
	log.Printf("kubelet has registered %s", s.driver)
	return &registration.RegistrationStatusResponse{}, nil
}

// driver asks the plugin for its name, until it answers.
func driver(plugin csi.IdentityClient) string {
	for {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		info, err := plugin.GetPluginInfo(ctx, &csi.GetPluginInfoRequest{})
		cancel()
		if err == nil {
			return info.GetName()
		}
		log.Printf("the plugin does not answer yet: %v", err)
		time.Sleep(200 * time.Millisecond)
	}
}

func register(plugin csi.IdentityClient) {
	name := driver(plugin)
	socket := filepath.Join(*folder, name+"-reg.sock")
	os.Remove(socket)
	listener, err := net.Listen("unix", socket)
	if err != nil {
		log.Fatalf("cannot listen: %v", err)
	}
	serving := grpc.NewServer()
	registration.RegisterRegistrationServer(serving, server{driver: name})
	log.Fatal(serving.Serve(listener))
}

func answerHealth(plugin csi.IdentityClient) {
	http.HandleFunc("/healthz", func(answer http.ResponseWriter, request *http.Request) {
		ctx, cancel := context.WithTimeout(request.Context(), *patience)
		defer cancel()
		probed, err := plugin.Probe(ctx, &csi.ProbeRequest{})
		if err != nil || probed.GetReady() != nil && !probed.GetReady().GetValue() {
			http.Error(answer, "not ready", http.StatusInternalServerError)
		}
	})
	log.Fatal(http.ListenAndServe(":"+strconv.Itoa(*health), nil))
}

func main() {
	flag.Parse()
	connection, err := grpc.NewClient("unix:"+*address,
		grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithAuthority("localhost"))
	if err != nil {
		log.Fatalf("cannot use %s: %v", *address, err)
	}
	plugin := csi.NewIdentityClient(connection)
	if *health != 0 {
		answerHealth(plugin)
	}
	register(plugin)
}
